//! Who owes a proof: a real step that the coordinator asks for itself ([`super::super::proof`] asks).
//!
//! - Who registers while an operator is attached *owes* one: no work goes to it before it has passed.
//! - Who was there before the operator came is *doubted*: asked as well, and goes on meanwhile.
//! - A shard of which a worker says that a row was not finite is doubted, and asked for that expert. What a worker
//!   says takes nothing from a cluster: a liar costs a question a second.
//! - A doubted shard that answers wrongly owes a proof from then on: it is shown as starting, covers no expert, and is
//!   asked until it passes. That it cannot be reached from here, or is busy, proves nothing. Nothing is proven of a
//!   doubted worker either by a step that fails, for which other processes may be to blame.

use std::time::Duration;

use cadre_types::{Generation, LayerId, LogicalExpert, MemberId, MemberState, Placement, Role, ShardIndex};
use tokio::time::Instant;

use super::{
    super::{
        layouts::Stamp,
        proof::{Question, Step, Verdict},
        report::ReportedFault,
    },
    ConnectionId, Registered, State,
};

/// Least time between two questions to a member; doubled with each that is not passed, up to [`MAX_PAUSE`].
const PAUSE: Duration = Duration::from_secs(1);
const MAX_PAUSE: Duration = Duration::from_secs(16);

/// How a member stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Proof {
    standing: Standing,
    /// Questions in a row that were not passed.
    failed: u32,
    /// Not asked before.
    after: Option<Instant>,
}

/// One expert of one layer.
type Expert = (LayerId, LogicalExpert);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Standing {
    /// Nobody asks for a proof.
    Unasked,
    /// Asked, and in use meanwhile; for a certain expert, or for any.
    Doubted {
        expert: Option<Expert>,
    },
    /// Not in use before it has passed.
    Owed {
        expert: Option<Expert>,
        failed: Option<String>,
    },
    Passed,
}

impl Proof {
    pub(super) fn of_new(has_operator: bool) -> Self {
        let owed = Standing::Owed { expert: None, failed: None };
        Self { standing: if has_operator { owed } else { Standing::Unasked }, failed: 0, after: None }
    }

    pub(super) fn is_owed(&self) -> bool {
        matches!(self.standing, Standing::Owed { .. })
    }

    /// What was wrong with the last answer of one that owes a proof.
    pub(super) fn failed(&self) -> Option<&str> {
        match &self.standing {
            Standing::Owed { failed, .. } => failed.as_deref(),
            Standing::Unasked | Standing::Doubted { .. } | Standing::Passed => None,
        }
    }

    /// `None` if nothing is to be asked; else the expert, if it is a certain one.
    fn asked(&self) -> Option<Option<Expert>> {
        match &self.standing {
            Standing::Doubted { expert } | Standing::Owed { expert, .. } => Some(*expert),
            Standing::Unasked | Standing::Passed => None,
        }
    }
}

impl State {
    /// An operator has come: who is here has not been asked.
    pub(super) fn ask_those_before(&mut self) {
        for known in self.members.values_mut() {
            if known.proof.standing == Standing::Unasked {
                known.proof.standing = Standing::Doubted { expert: None };
            }
        }
    }

    /// A worker says that rows of shards were not finite.
    pub(super) fn doubt(&mut self, faults: &[ReportedFault]) {
        for fault in faults {
            let accused = self.members.values_mut().find(|known| {
                known.member.role == Role::Expert(fault.shard) && known.member.address == fault.address
            });
            if let Some(known) = accused
                && matches!(known.proof.standing, Standing::Unasked | Standing::Passed)
            {
                known.proof.standing = Standing::Doubted { expert: Some((fault.layer, fault.expert)) };
            }
        }
    }

    /// What is to be asked now. Members that say that they are not ready, and those of which nothing can be asked yet,
    /// are left out.
    pub(in crate::coordinator) fn questions(&self, now: Instant) -> Vec<Question> {
        let asked = self.members.values().filter(|known| {
            known.member.state == MemberState::Ready && known.proof.after.is_none_or(|after| after <= now)
        });
        asked.filter_map(|known| self.question(known)).collect()
    }

    fn question(&self, known: &Registered) -> Option<Question> {
        let expert = known.proof.asked()?;
        let (generation, step) = match known.member.role {
            Role::Decode | Role::Both => (self.generation(), Step::Decode),
            Role::Prefill => (self.generation(), Step::Prefill { decode_address: self.decoding()? }),
            Role::Expert(shard) => {
                let placement = self.held(known, shard)?;
                let of_expert = expert.and_then(|expert| slot(placement, shard, expert));
                // It may not hold the expert any more; then any does.
                let slots = match of_expert {
                    Some(slot) => vec![slot],
                    None => placement.layers().iter().map(|placed| (placed.layer, 0)).collect(),
                };
                (Generation { epoch: placement.epoch(), ..self.generation }, Step::Rows { slots })
            }
        };
        Some(Question { connection: known.connection, member: known.member.clone(), generation, step })
    }

    /// A placement that the shard holds by its own word.
    fn held(&self, known: &Registered, shard: ShardIndex) -> Option<&Placement> {
        let placements = [self.layouts.in_force(), self.layouts.next()].into_iter().flatten();
        placements.map(|placement| &**placement).find(|placement| {
            shard.index() < placement.num_shards()
                && [known.applied, known.prepared].contains(&Stamp::of(placement))
        })
    }

    /// The address of a worker that a prompt can be handed to.
    fn decoding(&self) -> Option<String> {
        let decoding = self
            .members
            .values()
            .find(|known| known.member.role == Role::Decode && self.shown(known).state == MemberState::Ready);
        Some(decoding?.member.address.clone())
    }

    /// Takes the answer to a question. The member, if others are told something else of it now, and what was wrong.
    pub(in crate::coordinator) fn judge(
        &mut self,
        now: Instant,
        connection: ConnectionId,
        verdict: Verdict,
    ) -> Option<(MemberId, Option<String>)> {
        let known = self.members.values_mut().find(|known| known.connection == connection)?;
        let is_shard = matches!(known.member.role, Role::Expert(_));
        let proof = &mut known.proof;
        let expert = proof.asked()?;
        let before = proof.standing.clone();
        proof.standing = match (verdict, before.clone()) {
            (Verdict::Passed, _) => Standing::Passed,
            (Verdict::Wrong(what), _) if is_shard => Standing::Owed { expert, failed: Some(what) },
            (Verdict::Wrong(what) | Verdict::Unanswered(what), Standing::Owed { .. }) => {
                Standing::Owed { expert, failed: Some(what) }
            }
            (_, doubted) => doubted,
        };
        proof.failed = if proof.standing == Standing::Passed { 0 } else { proof.failed.saturating_add(1) };
        let doublings = proof.failed.saturating_sub(1).min(8);
        proof.after = Some(now + PAUSE.saturating_mul(1 << doublings).min(MAX_PAUSE));
        let was_owed = matches!(before, Standing::Owed { .. });
        (proof.standing != before && (was_owed || proof.is_owed()))
            .then(|| (known.member.id.clone(), proof.failed().map(str::to_owned)))
    }

    /// When a question may be asked that may not be now.
    pub(in crate::coordinator) fn next_question(&self, now: Instant) -> Option<Instant> {
        let asked = self.members.values().filter(|known| known.proof.asked().is_some());
        asked.filter_map(|known| known.proof.after).filter(|after| *after > now).min()
    }

    /// Members that owe a proof after one that failed.
    pub(in crate::coordinator) fn failed_proofs(&self) -> usize {
        self.members.values().filter(|known| known.proof.failed().is_some()).count()
    }

    pub(in crate::coordinator) fn failed_proof(&self, id: &MemberId) -> Option<&str> {
        self.members.get(id)?.proof.failed()
    }
}

/// The slot of an expert's copy on a shard.
fn slot(placement: &Placement, shard: ShardIndex, (layer, expert): Expert) -> Option<(LayerId, u32)> {
    let mut copies = placement.replicas(layer, expert).iter();
    Some((layer, u32::from(copies.find(|copy| copy.shard == shard)?.slot.0)))
}
