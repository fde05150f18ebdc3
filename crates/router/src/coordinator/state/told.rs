//! What others are told: members their view, the router its workers, the operator the status, the layouts their
//! facts.

use std::sync::Arc;

use cadre_types::{
    ClusterView, CoordinatorStatus, Coverage, Generation, Member, MemberState, MemberStatus, NextLayout,
    Placement, PlacementEpoch, Role, ShardIndex,
};
use tokio::time::Instant;

use super::{
    super::{
        WorkerEntry, WorkerTable,
        coverage::{Routable, coverage},
        layouts::Facts,
    },
    Registered, State,
};

impl State {
    /// The stamp in force; epoch 0 before the first placement.
    pub(in crate::coordinator) fn generation(&self) -> Generation {
        let epoch = self.placement().map_or(PlacementEpoch(0), Placement::epoch);
        Generation { epoch, ..self.generation }
    }

    /// What members are told; nothing before the first placement.
    pub(in crate::coordinator) fn view(&self) -> Option<ClusterView> {
        Some(ClusterView {
            generation: self.generation(),
            placement: Arc::clone(self.layouts.in_force()?),
            next: self.layouts.next().cloned(),
            oldest_epoch: self.layouts.oldest(),
            members: self.shown_members(),
        })
    }

    /// Everybody who is registered, as others are told.
    pub(in crate::coordinator) fn shown_members(&self) -> Vec<Member> {
        self.members.values().map(|known| self.shown(known)).collect()
    }

    /// A member as others are told: whose pod is going away, or who has not proven itself, gets nothing new, whatever
    /// it says itself.
    pub(super) fn shown(&self, known: &Registered) -> Member {
        let mut member = known.member.clone();
        if self.pods.is_withdrawn(member.pod.as_ref()) {
            member.state = MemberState::Draining;
        } else if known.proof.is_owed() && member.state == MemberState::Ready {
            member.state = MemberState::Starting;
        }
        member
    }

    pub(in crate::coordinator) fn worker_table(&self) -> WorkerTable {
        let workers = self
            .members
            .values()
            .filter(|known| !matches!(known.member.role, Role::Expert(_)))
            .map(|known| WorkerEntry { member: self.shown(known), load: known.load, report: known.report })
            .collect();
        WorkerTable { generation: self.generation(), workers }
    }

    /// How well experts are covered; everything is uncovered before the first placement.
    pub(in crate::coordinator) fn coverage(&self) -> Coverage {
        let Some(placement) = self.placement() else { return Coverage::default() };
        let mut routable = Routable::new();
        for known in self.members.values() {
            if let Role::Expert(shard) = known.member.role
                && self.is_routable(known)
            {
                let domain = self.pods.domain(known.member.pod.as_ref());
                let at = routable.entry(shard.0).or_insert(domain);
                *at = at.or(domain);
            }
        }
        coverage(placement, self.layouts.layout().min_copies, &routable)
    }

    /// Whether work is routed to a member: it has proven itself, is not on its way out, and, for a shard,
    /// a placement in use has it.
    fn is_routable(&self, known: &Registered) -> bool {
        let placed = |shard: ShardIndex| {
            let has = |placement: &Arc<Placement>| shard.index() < placement.num_shards();
            self.layouts.in_force().is_some_and(has) || self.layouts.next().is_some_and(has)
        };
        self.shown(known).state == MemberState::Ready
            && match known.member.role {
                Role::Expert(shard) => placed(shard),
                Role::Prefill | Role::Decode | Role::Both => true,
            }
    }

    /// Everything, for the operator.
    pub(in crate::coordinator) fn status(
        &self,
        now: Instant,
        imbalance: Option<f64>,
        serving: bool,
    ) -> CoordinatorStatus {
        let members = self.members.values().map(|known| MemberStatus {
            member: self.shown(known),
            routable: self.is_routable(known),
            applied: known.applied.epoch,
            loading: known.loading,
            sequences: known.load.running_sequences.saturating_add(known.load.waiting_sequences),
            stranger: self.pods.stranger(&known.member).map(|why| why.to_string()),
            device: known.device.clone(),
            failed_proof: known.proof.failed().map(str::to_owned),
        });
        let next = self.layouts.waiting_for(now, &self.facts()).map(|waiting_for| NextLayout {
            layout: self.layouts.wanted(),
            epoch: self.layouts.next().map(|next| next.epoch()),
            waiting_for,
        });
        CoordinatorStatus {
            generation: self.generation(),
            layout: self.layouts.layout(),
            next,
            members: members.collect(),
            coverage: self.coverage(),
            imbalance,
            serving,
        }
    }

    pub(super) fn facts(&self) -> Facts {
        let mut facts = Facts::default();
        for known in self.members.values() {
            let applied = known.applied;
            let Role::Expert(shard) = known.member.role else {
                if applied.epoch.0 > 0 {
                    facts.workers.push(applied.epoch);
                }
                continue;
            };
            let member = self.shown(known);
            if member.state == MemberState::Draining {
                continue;
            }
            let pod = member.pod.as_ref();
            let shard = facts.shards.entry(shard.0).or_default();
            if member.state == MemberState::Ready {
                shard.held.extend([applied, known.prepared].into_iter().filter(|stamp| stamp.epoch.0 > 0));
            }
            let domain = self.pods.domain(pod);
            shard.domain_settled |= pod.is_none() || domain.is_some();
            if let Some(domain) = domain {
                shard.domain = Some(domain.to_owned());
            }
        }
        facts
    }
}
