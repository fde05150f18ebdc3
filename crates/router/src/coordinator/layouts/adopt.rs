//! After a restart: what is learnt from the placements that members hold (module header, *Epochs*).

use std::sync::Arc;

use cadre_types::{Placement, PlacementEpoch};
use tokio::time::Instant;

use super::{Layouts, Placed, SETTLE, Stamp};

/// What the placement in force rests on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// Our own first plan, which nobody holds: any member knows better.
    Planned,
    /// Members hold it, and those that hold another may still be on their way until then.
    Held(Instant),
    /// Nobody can know better.
    Confirmed,
}

/// How many shards hold what a report names, and how many hold what is in force.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::coordinator) struct Holders {
    pub(in crate::coordinator) reported: usize,
    pub(in crate::coordinator) in_force: usize,
}

impl Layouts {
    /// Whether a whole placement in a report can be one. Says why not.
    pub(in crate::coordinator) fn check(&self, applied: Stamp, whole: &Placement) -> Result<(), String> {
        if Stamp::of(whole) != applied {
            return Err(format!("{} with another digest than the report names", whole.epoch()));
        }
        self.planner.fits(whole)
    }

    /// Learns from what a member has applied (module header). True if the view changed.
    pub(in crate::coordinator) fn adopt(
        &mut self,
        now: Instant,
        applied: Stamp,
        whole: Option<&Placement>,
        holders: Holders,
    ) -> bool {
        let Stamp { epoch, digest } = applied;
        if epoch.0 == 0 {
            return false;
        }
        let whole = whole.filter(|whole| self.check(applied, whole).is_ok());
        let ours = self.in_force().map(|placement| Stamp::of(placement));
        let known = self.last_epoch;
        self.last_epoch = known.max(epoch.0);
        let Some(ours) = ours else {
            let Some(whole) = whole else { return false };
            self.take_over(now, whole.clone());
            return true;
        };
        if ours.digest == digest {
            self.held(now);
            if epoch > ours.epoch {
                self.relabel(epoch);
                return true;
            }
            return false;
        }
        let replaces = match self.standing {
            Standing::Planned => true,
            Standing::Held(until) => {
                let Holders { reported, in_force } = holders;
                now < until && (reported > in_force || (reported == in_force && epoch > ours.epoch))
            }
            Standing::Confirmed => false,
        };
        match whole {
            Some(whole) if replaces => {
                // Its own number unless that has meant, or may mean, something else.
                let whole = match epoch > ours.epoch || self.standing == Standing::Planned {
                    true => whole.clone(),
                    false => {
                        self.last_epoch += 1;
                        whole.with_epoch(PlacementEpoch(self.last_epoch))
                    }
                };
                self.take_over(now, whole);
                true
            }
            // Epochs that we have given out or passed already say nothing new.
            _ if epoch >= ours.epoch && (epoch.0 > known || epoch == ours.epoch) => {
                self.last_epoch += 1;
                self.relabel(PlacementEpoch(self.last_epoch));
                true
            }
            _ => false,
        }
    }

    /// Members hold what is in force. The first of them may be one that had nothing when it came, or the wrong one.
    pub(super) fn held(&mut self, now: Instant) {
        if self.standing == Standing::Planned {
            self.standing = Standing::Held(now + SETTLE);
        }
    }

    pub(super) fn take_over(&mut self, now: Instant, whole: Placement) {
        let layout = self.planner.layout_of(&whole);
        tracing::info!(epoch = %whole.epoch(), ?layout, "placement taken over from a member's report");
        self.in_force = Some(Placed { placement: Arc::new(whole), layout });
        // Its number may be in use elsewhere.
        self.next = None;
        self.oldest = PlacementEpoch(0);
        self.held(now);
        // A later word does not make an earlier one wait again.
        if let Standing::Held(until) = self.standing {
            self.settled_at = Some(until);
        }
    }

    pub(super) fn relabel(&mut self, epoch: PlacementEpoch) {
        if let Some(placed) = &mut self.in_force {
            tracing::info!(before = %placed.placement.epoch(), after = %epoch, "epoch moved by a member's report");
            placed.placement = Arc::new(placed.placement.with_epoch(epoch));
        }
        self.next = None;
    }
}
