//! Which slots hold which experts: a pure planner from expert load to placement.
//!
//! Owns the arithmetic of balance and of safety; refuses to know processes, bytes, networks and time. The
//! same load gives the same plan, bit for bit, on every machine: loads are integers, are reduced by their
//! common divisor, and every choice has a stated tie rule. Nothing is drawn at random.
//!
//! Read [`plan_initial`] first.
//! - [`load`]: tokens per (layer, logical expert), the input, with its JSON form.
//! - [`eplb`]: the published algorithm, reproduced as published; the yardstick.
//! - [`plan`]: our planner. It differs from EPLB where the design asks for more: any number of shards,
//!   copies of an expert always on different shards, a guaranteed number of copies.
//! - [`spread`]: the copies of a placement moved apart, after its shards have moved to other failure domains.
//! - [`report`]: what a placement means: imbalance, copies, and what each shard's loss would uncover.
//!
//! Not here yet: the plan of moves that follow uneven load, under a budget. It joins as a module
//! beside `plan`, and the executor that carries it out belongs to the coordinator.

pub mod eplb;
pub mod load;
mod pack;
pub mod plan;
pub mod report;
pub mod spread;

pub use load::{ExpertLoad, LayerLoad, LoadError};
pub use plan::{DomainIndex, PlanError, affordable_copies, plan_initial};
pub use report::{PlacementReport, ReportError, explain};
pub use spread::plan_spread;
