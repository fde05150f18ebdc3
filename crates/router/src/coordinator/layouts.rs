//! Which placement is in force, which one is on its way, and when one becomes the other.
//!
//! A change of layout in order: the wanted layout is planned under a new epoch once all of its shards are
//! registered (`next`) → every one of them loads it beside what it serves and reports it as prepared → it
//! is put in force, and the view still names the epoch before as the oldest one in use → every worker
//! reports it as applied → the oldest epoch moves up, and shards drop what they no longer need. A shard
//! that dies on the way is waited for; the placement in force goes on. The newest wanted layout wins: a
//! `next` for another one is forgotten.
//!
//! **Domains.** A shard's successor may be on another node, and then copies that were apart are together. When all
//! shards have served for [`CALM`] and a placement of the same layout is better, it becomes the next one. Earlier it
//! would follow every step of a rolling replacement.
//!
//! **Epochs.** One epoch never means two placements: every plan takes a number above all that were ever
//! seen. State is soft, so after a restart numbers and placement come from the members. The first whole
//! placement that a member reports is taken over (a restart moves nothing). For [`SETTLE`] after that nothing is
//! planned and nothing is dropped, because others may still be on their way back, and until then another
//! placement replaces it if more shards hold that, or as many and its epoch is later: a single worker from
//! another cluster outweighs no shard. Then, or once a placement of our own has come into force, it is
//! *confirmed*, and no report replaces it any more. Whatever epoch is reported without being taken over is passed.
//!
//! ([`adopt`].)
//!
//! Pure: time and facts come in, so every rule is tested without a clock.

mod adopt;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use cadre_placement::DomainIndex;
use cadre_types::{Layout, Placement, PlacementEpoch};
use tokio::time::Instant;

use super::plan::Planner;
pub(super) use adopt::Holders;
use adopt::Standing;

/// Time after a restart in which members come back: their reconnection takes at most 2 s (back-off), and
/// their first report is a moment later.
pub(super) const SETTLE: Duration = Duration::from_secs(4);

/// All shards have to hold the placement and stay in their domains for so long before copies move for the sake of
/// domains. The operator replaces the next old shard within a second or two of the last one's readiness.
pub(super) const CALM: Duration = Duration::from_secs(10);

/// Names a placement: its epoch and the digest of its slots.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Stamp {
    pub(super) epoch: PlacementEpoch,
    pub(super) digest: u64,
}

impl Stamp {
    pub(super) fn of(placement: &Placement) -> Self {
        Self { epoch: placement.epoch(), digest: placement.digest() }
    }
}

/// What is known of one shard index: the best of the members that serve it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct ShardFacts {
    /// Placements that a ready member holds.
    pub(super) held: Vec<Stamp>,
    /// The failure domain.
    pub(super) domain: Option<String>,
    /// Nothing more will be learnt of the domain by waiting: it is known, or the member has no pod.
    pub(super) domain_settled: bool,
}

/// What the members say.
#[derive(Clone, Debug, Default)]
pub(super) struct Facts {
    /// Registered shards by index.
    pub(super) shards: BTreeMap<u16, ShardFacts>,
    /// Applied epochs of workers; those that have applied nothing are left out, they have no frames out.
    pub(super) workers: Vec<PlacementEpoch>,
}

/// A placement with the layout that it was made for.
#[derive(Clone, Debug)]
struct Placed {
    placement: Arc<Placement>,
    layout: Layout,
}

/// What changed, for metrics and logs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// A placement was planned as the next.
    Planned,
    /// The next placement came into force, or the first one did.
    InForce,
    /// A planned placement was given up for another layout.
    GivenUp,
    /// Nobody uses older placements any more.
    Settled,
}

/// The state machine.
#[derive(Debug)]
pub(super) struct Layouts {
    planner: Planner,
    /// Longest wait for shards and their domains before the first plan, and for domains before others.
    wait: Duration,
    wanted: Layout,
    in_force: Option<Placed>,
    standing: Standing,
    next: Option<Placed>,
    oldest: PlacementEpoch,
    last_epoch: u64,
    settled_at: Option<Instant>,
    /// When the first shard was there, for the first plan; when all were, for later ones.
    waiting_since: Option<Instant>,
    /// Why the wanted layout cannot be planned.
    problem: Option<String>,
    spread: Spread,
}

/// Where the shards are, for the placement in force.
#[derive(Clone, Debug, Default)]
struct Spread {
    domains: Vec<Option<DomainIndex>>,
    epoch: PlacementEpoch,
    /// Since when; `None` while a shard is missing.
    since: Option<Instant>,
    /// Looked at already: the better placement was planned, or there is none.
    is_judged: bool,
}

impl Layouts {
    pub(super) fn new(planner: Planner, wanted: Layout, wait: Duration) -> Self {
        Self {
            planner,
            wait,
            wanted,
            in_force: None,
            standing: Standing::Planned,
            next: None,
            oldest: PlacementEpoch(0),
            last_epoch: 0,
            settled_at: None,
            waiting_since: None,
            problem: None,
            spread: Spread::default(),
        }
    }

    pub(super) fn planner(&self) -> &Planner {
        &self.planner
    }

    pub(super) fn in_force(&self) -> Option<&Arc<Placement>> {
        self.in_force.as_ref().map(|placed| &placed.placement)
    }

    /// The layout in force; before the first placement, the wanted one.
    pub(super) fn layout(&self) -> Layout {
        self.in_force.as_ref().map_or(self.wanted, |placed| placed.layout)
    }

    pub(super) fn wanted(&self) -> Layout {
        self.wanted
    }

    pub(super) fn next(&self) -> Option<&Arc<Placement>> {
        self.next.as_ref().map(|placed| &placed.placement)
    }

    pub(super) fn oldest(&self) -> PlacementEpoch {
        self.oldest
    }

    /// Shards that have a reason to be here.
    pub(super) fn known_shards(&self) -> usize {
        let of = |placed: &Option<Placed>| placed.as_ref().map_or(0, |placed| placed.placement.num_shards());
        of(&self.in_force).max(of(&self.next)).max(usize::from(self.wanted.shards))
    }

    /// Asks for a layout; the newest wins.
    pub(super) fn want(&mut self, layout: Layout) {
        if self.wanted != layout {
            tracing::info!(before = ?self.wanted, after = ?layout, "another layout is wanted");
            self.wanted = layout;
            self.waiting_since = None;
            self.problem = None;
        }
    }

    /// Whether the wanted layout is in force and nothing older is in use.
    pub(super) fn is_settled(&self) -> bool {
        self.next.is_none() && self.satisfied() && self.oldest >= self.epoch()
    }

    fn epoch(&self) -> PlacementEpoch {
        self.in_force().map_or(PlacementEpoch(0), |placement| placement.epoch())
    }

    /// The highest epoch that was ever given out or reported.
    pub(super) fn last_epoch(&self) -> u64 {
        self.last_epoch
    }

    /// Makes every step that the facts allow.
    pub(super) fn advance(&mut self, now: Instant, facts: &Facts) -> Vec<Change> {
        let mut changes = Vec::new();
        while let Some(change) = self.step(now, facts) {
            changes.push(change);
        }
        changes
    }

    fn step(&mut self, now: Instant, facts: &Facts) -> Option<Change> {
        if self.in_force.is_none() {
            return self.plan_first(now, facts).then_some(Change::InForce);
        }
        if let Some(next) = &self.next {
            if next.layout != self.wanted {
                self.next = None;
                return Some(Change::GivenUp);
            }
            if unprepared(&next.placement, facts).is_empty() {
                self.in_force = self.next.take();
                self.standing = Standing::Confirmed;
                return Some(Change::InForce);
            }
        } else if self.satisfied() {
            self.adopt_wanted_layout();
            if self.plan_spread(now, facts) {
                return Some(Change::Planned);
            }
        } else if self.plan_next(now, facts) {
            return Some(Change::Planned);
        }
        let epoch = self.epoch();
        let drained = facts.workers.iter().all(|applied| *applied >= epoch);
        if self.oldest < epoch && drained && self.is_past_settling(now) {
            self.oldest = epoch;
            return Some(Change::Settled);
        }
        None
    }

    fn is_past_settling(&self, now: Instant) -> bool {
        self.settled_at.is_none_or(|at| at <= now)
    }

    /// When something may happen without a report.
    pub(super) fn wake(&self, now: Instant) -> Option<Instant> {
        let waited = self.waiting_since.map(|since| since + self.wait);
        let calm = self.spread.since.filter(|_| !self.spread.is_judged).map(|since| since + CALM);
        [self.settled_at, waited, calm].into_iter().flatten().filter(|at| *at > now).min()
    }

    fn satisfied(&self) -> bool {
        self.in_force.as_ref().is_some_and(|placed| {
            placed.layout == self.wanted || self.planner.satisfies(&placed.placement, self.wanted)
        })
    }

    /// A placement may meet a layout that it was not made for: fewer guaranteed copies than it has.
    fn adopt_wanted_layout(&mut self) {
        let wanted = self.wanted;
        if let Some(placed) = &mut self.in_force {
            placed.layout = wanted;
        }
        self.problem = None;
        self.waiting_since = None;
    }

    fn plan_first(&mut self, now: Instant, facts: &Facts) -> bool {
        if self.waiting_since.is_none() && !facts.shards.is_empty() {
            self.waiting_since = Some(now);
        }
        let waited = self.waiting_since.is_some_and(|since| now >= since + self.wait);
        let complete = self.missing(facts).is_empty() && self.domains_settled(facts);
        if !(self.wait.is_zero() || waited || complete) {
            return false;
        }
        let Some(placed) = self.plan(facts) else { return false };
        self.oldest = placed.placement.epoch();
        self.in_force = Some(placed);
        self.waiting_since = None;
        true
    }

    fn plan_next(&mut self, now: Instant, facts: &Facts) -> bool {
        if !self.is_past_settling(now) || !self.missing(facts).is_empty() {
            self.waiting_since = None;
            return false;
        }
        let since = *self.waiting_since.get_or_insert(now);
        if !self.domains_settled(facts) && now < since + self.wait {
            return false;
        }
        if self.problem.is_some() {
            return false;
        }
        let Some(placed) = self.plan(facts) else { return false };
        self.waiting_since = None;
        self.next = Some(placed);
        true
    }

    /// Moves copies apart once the shards have been where they are for long enough.
    fn plan_spread(&mut self, now: Instant, facts: &Facts) -> bool {
        let Some(Placed { placement, layout }) = self.in_force.clone() else { return false };
        let is_whole = unprepared(&placement, facts).is_empty() && self.domains_settled(facts);
        if layout.min_copies < 2 || !self.is_past_settling(now) || !is_whole {
            self.spread = Spread::default();
            return false;
        }
        let domains = domains(layout, facts);
        if self.spread.since.is_none()
            || (&self.spread.domains, self.spread.epoch) != (&domains, placement.epoch())
        {
            self.spread = Spread { domains, epoch: placement.epoch(), since: Some(now), is_judged: false };
        }
        if self.spread.is_judged || self.spread.since.is_none_or(|since| now < since + CALM) {
            return false;
        }
        self.spread.is_judged = true;
        let epoch = PlacementEpoch(self.last_epoch + 1);
        match self.planner.spread(&placement, layout, &self.spread.domains, epoch) {
            Ok(None) => false,
            Ok(Some(placement)) => {
                tracing::info!(%epoch, "copies are moved apart, their shards are in other failure domains");
                self.last_epoch += 1;
                self.next = Some(Placed { placement: Arc::new(placement), layout });
                true
            }
            Err(error) => {
                tracing::error!(%error, "copies cannot be moved apart");
                false
            }
        }
    }

    fn plan(&mut self, facts: &Facts) -> Option<Placed> {
        let layout = self.wanted;
        match self.planner.plan(layout, &domains(layout, facts), PlacementEpoch(self.last_epoch + 1)) {
            Ok(placement) => {
                self.last_epoch += 1;
                self.problem = None;
                Some(Placed { placement: Arc::new(placement), layout })
            }
            Err(error) => {
                tracing::error!(%error, ?layout, "the wanted layout cannot be planned");
                self.problem = Some(error.to_string());
                None
            }
        }
    }

    fn missing(&self, facts: &Facts) -> Vec<u16> {
        (0..self.wanted.shards).filter(|shard| !facts.shards.contains_key(shard)).collect()
    }

    fn domains_settled(&self, facts: &Facts) -> bool {
        (0..self.wanted.shards)
            .all(|shard| facts.shards.get(&shard).is_some_and(|known| known.domain_settled))
    }

    /// What the wanted layout waits for, in words; `None` if it is in force and nothing older is in use.
    pub(super) fn waiting_for(&self, now: Instant, facts: &Facts) -> Option<String> {
        if self.is_settled() {
            return None;
        }
        if let Some(problem) = &self.problem {
            return Some(problem.clone());
        }
        if let Some(next) = &self.next {
            let late = unprepared(&next.placement, facts);
            return Some(format!("{} not loaded the experts of {}", have(&late), next.placement.epoch()));
        }
        if self.in_force.is_some() && self.satisfied() {
            let (epoch, late) = (self.epoch(), facts.workers.iter().filter(|at| **at < self.epoch()).count());
            return Some(match late {
                0 => "members to come back after the router's restart".to_owned(),
                1 => format!("1 worker has not taken up {epoch}"),
                late => format!("{late} workers have not taken up {epoch}"),
            });
        }
        let missing = self.missing(facts);
        if !missing.is_empty() {
            return Some(format!("{} not registered", have(&missing)));
        }
        if !self.is_past_settling(now) {
            return Some("members to come back after the router's restart".to_owned());
        }
        Some("the failure domains of the shards".to_owned())
    }

    /// Shards of the next placement: how many hold it, and how many there are.
    pub(super) fn prepared(&self, facts: &Facts) -> (usize, usize) {
        self.next().map_or((0, 0), |next| {
            let shards = next.num_shards();
            (shards - unprepared(next, facts).len(), shards)
        })
    }

    /// Puts a placement in force as if it had been planned.
    #[cfg(test)]
    pub(super) fn force(&mut self, placement: Placement) {
        self.last_epoch = self.last_epoch.max(placement.epoch().0);
        self.oldest = placement.epoch();
        let layout = self.planner.layout_of(&placement);
        self.wanted = layout;
        self.in_force = Some(Placed { placement: Arc::new(placement), layout });
        self.standing = Standing::Planned;
    }
}

/// Shards of a placement without a ready member that holds it.
fn unprepared(placement: &Placement, facts: &Facts) -> Vec<u16> {
    let stamp = Stamp::of(placement);
    let holds = |shard: &u16| facts.shards.get(shard).is_some_and(|known| known.held.contains(&stamp));
    // A placement's shards have 16-bit ids.
    (0..placement.num_shards()).map(|shard| shard as u16).filter(|shard| !holds(shard)).collect()
}

/// Domains by name become indices in the order of shards.
fn domains(layout: Layout, facts: &Facts) -> Vec<Option<DomainIndex>> {
    let mut numbers: BTreeMap<&str, u16> = BTreeMap::new();
    (0..layout.shards)
        .map(|shard| {
            let domain = facts.shards.get(&shard)?.domain.as_deref()?;
            let fresh = numbers.len() as u16;
            Some(DomainIndex(*numbers.entry(domain).or_insert(fresh)))
        })
        .collect()
}

/// "shards 4, 5 have": the first few are named.
fn have(shards: &[u16]) -> String {
    const NAMED: usize = 8;
    let mut names: Vec<String> = shards.iter().take(NAMED).map(u16::to_string).collect();
    if shards.len() > NAMED {
        names.push(format!("and {} more", shards.len() - NAMED));
    }
    match shards {
        [_] => format!("shard {} has", names.join(", ")),
        _ => format!("shards {} have", names.join(", ")),
    }
}

#[cfg(test)]
mod tests;
