//! The coordinator's state under any sequence of what members and operators may say (tests/fuzz). What it promises
//! whatever comes: no panic, a view that its own members can read, and no more members than it has room for.

use std::time::Duration;

use cadre_placement::{ExpertLoad, LayerLoad};
use cadre_proto::v1;
use cadre_types::{
    ClusterView, Generation, LayerId, Layout, ModelHash, NumericsClass, OperatorView, Placement,
    PlacementEpoch,
};
use tokio::{sync::oneshot, time::Instant};

use super::{
    Planner, PublishedView,
    layouts::Layouts,
    proof::Verdict,
    report::MemberReport,
    state::{ConnectionId, State},
    uncovered,
};

/// Something that reaches the owner. Connections are counted in the order in which they came.
#[derive(Clone, Debug)]
pub enum Event {
    /// A member's first report. A digest of 1 stands for the placement in force, 2 for the next one, each with its
    /// epoch.
    Join(v1::Report),
    /// A later report of a connection.
    Report(usize, v1::Report),
    /// A connection ends.
    Leave(usize),
    /// So many milliseconds pass.
    Wait(u64),
    /// The operator's view.
    Operate(v1::OperatorView),
    /// The operator's stream ends.
    OperatorLeft,
    /// The worker of a connection has done a step.
    Proven(usize),
}

/// Weights and numerics of the model that [`coordinate`] serves.
pub fn generation(epoch: u64) -> Generation {
    Generation { model: ModelHash([7; 16]), numerics: NumericsClass::Bf16, epoch: PlacementEpoch(epoch) }
}

/// Takes the events one after the other, as the owner task does.
pub fn coordinate(events: Vec<Event>) {
    let layer = |layer| LayerLoad { layer: LayerId(layer), tokens: vec![2, 1, 1] };
    let Ok(load) = ExpertLoad::new(vec![layer(1), layer(2)]) else { return };
    let layout = Layout { shards: 2, redundant_slots: 1, min_copies: 1 };
    let layouts = Layouts::new(Planner::for_load(load), layout, Duration::from_secs(1));
    let mut state = State::new(generation(0), layouts, Duration::from_secs(3), Duration::from_secs(60));
    let mut now = Instant::now();
    let mut connections: Vec<ConnectionId> = Vec::new();
    state.advance(now);
    for event in events {
        match event {
            Event::Join(report) => {
                if let Ok(report) = MemberReport::try_from(named(report, &state))
                    && let Ok((connection, _)) = state.join(now, report, oneshot::channel().0)
                {
                    connections.push(connection);
                }
            }
            Event::Report(at, report) => {
                if let (Some(&connection), Ok(report)) =
                    (connections.get(at), MemberReport::try_from(named(report, &state)))
                    && let Err(refusal) = state.report(now, connection, report)
                {
                    drop(state.refuse(connection, refusal.into()));
                }
            }
            Event::Leave(at) => {
                if let Some(&connection) = connections.get(at) {
                    drop(state.leave(connection));
                }
            }
            Event::Wait(milliseconds) => now += Duration::from_millis(milliseconds),
            Event::Operate(view) => {
                if let Ok(view) = OperatorView::try_from(&view) {
                    drop(state.operate(now, &view));
                }
            }
            Event::OperatorLeft => state.operator_left(),
            Event::Proven(at) => {
                if let Some(&connection) = connections.get(at) {
                    drop(state.judge(now, connection, Verdict::Passed));
                }
            }
        }
        drop(state.expire(now));
        state.advance(now);
        check(&mut state, now);
    }
}

fn named(mut report: v1::Report, state: &State) -> v1::Report {
    let layouts = state.layouts();
    let chosen = |digest: u64| match digest {
        1 => layouts.in_force(),
        2 => layouts.next(),
        _ => None,
    };
    if let Some(placement) = chosen(report.placement_digest) {
        report.placement_digest = placement.digest();
        if let Some(generation) = &mut report.generation {
            generation.epoch = placement.epoch().0;
        }
    }
    if let Some(placement) = chosen(report.prepared_digest) {
        report.prepared_digest = placement.digest();
        report.prepared_epoch = placement.epoch().0;
    }
    report
}

/// What everybody relies on, after every event.
fn check(state: &mut State, now: Instant) {
    let members = state.shown_members();
    let status = v1::CoordinatorStatus::from(&state.status(now, None, true));
    assert_eq!(status.members.len(), members.len());
    assert_eq!(state.worker_table().generation, state.generation());
    let (prepared, shards) = state.prepared();
    assert!(prepared <= shards, "{prepared} of {shards} shards are prepared");
    drop(state.expert_load(now));
    state.next_expiry(now);
    drop(state.questions(now));
    state.next_question(now);
    state.failed_proofs();
    let Some(view) = state.view() else { return };
    assert_eq!(view.generation.epoch, view.placement.epoch(), "a view's stamp is its placement's");
    complete(&view.placement);
    uncovered(&view);
    let published = PublishedView::new(view.clone());
    let read = ClusterView::try_from(&published.wire).map_err(|error| error.to_string());
    assert_eq!(read, Ok(view), "members read what is published");
}

/// Every expert of every layer has a slot: tokens chosen for it would go nowhere.
fn complete(placement: &Placement) {
    let layers: Vec<LayerId> = placement.layers().iter().map(|layer| layer.layer).collect();
    assert_eq!(layers, [LayerId(1), LayerId(2)]);
    assert_eq!(placement.num_experts(), 3);
    for layer in layers {
        for expert in (0..3).map(cadre_types::LogicalExpert) {
            assert!(!placement.replicas(layer, expert).is_empty(), "{expert} of {layer} is nowhere");
        }
    }
}
