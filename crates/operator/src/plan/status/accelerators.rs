//! The accelerators that a model's processes say they compute on.
//!
//! Shard and worker of one pod are on one card, so a pod counts once. Of the memory it is the fullest card that is told: it is
//! the first that something does not fit into.

use std::collections::BTreeMap;

use cadre_k8s_api::{
    Tier,
    status::{AcceleratorStatus, AcceleratorsStatus},
};
use cadre_types::MemberDevice;

use super::Judged;
use crate::plan::{component::Component, pods::OurPod};

/// A change below this part of a card's memory is noise of the traffic and not worth a write.
const STEP: i64 = 100;

/// Kinds of cards in one model; more are left out.
const MAX_CARDS: usize = 16;

impl Judged<'_, '_> {
    pub(super) fn accelerators(&self) -> Option<AcceleratorsStatus> {
        let before = self.facts.model().status.as_ref().and_then(|status| status.accelerators.as_ref());
        if self.facts.word().is_none() {
            return before.cloned();
        }
        let mut cards: Vec<AcceleratorStatus> =
            Tier::ALL.into_iter().flat_map(|tier| self.of_tier(tier)).take(MAX_CARDS).collect();
        for card in &mut cards {
            let known = before.into_iter().flat_map(|before| &before.cards);
            let same = known.filter(|known| known.tier == card.tier && known.name == card.name);
            let mut alike = same.filter(|known| {
                known.memory_total == card.memory_total
                    && (known.memory_used - card.memory_used).abs() < card.memory_total / STEP
            });
            if let Some(known) = alike.next() {
                card.memory_used = known.memory_used;
            }
        }
        let summary = summary(&cards);
        (!cards.is_empty()).then_some(AcceleratorsStatus { cards, summary })
    }

    fn of_tier(&self, tier: Tier) -> Vec<AcceleratorStatus> {
        let mut cards: BTreeMap<&str, AcceleratorStatus> = BTreeMap::new();
        for device in self.facts.active(Component::Tier(tier)).filter_map(card) {
            let (used, total) = (bytes(device.memory_used), bytes(device.memory_total));
            let card = cards.entry(&device.name).or_insert_with(|| AcceleratorStatus {
                tier,
                name: super::cut(device.name.clone(), 64),
                count: 0,
                memory_used: used,
                memory_total: total,
            });
            card.count += 1;
            if is_fuller((used, total), (card.memory_used, card.memory_total)) {
                (card.memory_used, card.memory_total) = (used, total);
            }
        }
        cards.into_values().collect()
    }
}

/// The accelerator of a pod, as one of its members reports it.
fn card<'a>(pod: &OurPod<'a>) -> Option<&'a MemberDevice> {
    let devices = [pod.member, pod.beside].into_iter().flatten().filter_map(|member| member.device.as_ref());
    devices.into_iter().find(|device| device.device != "cpu")
}

fn bytes(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

fn is_fuller((used, total): (i64, i64), (than, of): (i64, i64)) -> bool {
    i128::from(used) * i128::from(of) > i128::from(than) * i128::from(total)
}

/// `32 x NVIDIA H200, 61.2/139.8 GiB`, by name.
pub(super) fn summary<'a>(cards: impl IntoIterator<Item = &'a AcceleratorStatus>) -> String {
    let mut names: BTreeMap<&str, (i32, (i64, i64))> = BTreeMap::new();
    for card in cards {
        let memory = (card.memory_used, card.memory_total);
        let (count, fullest) = names.entry(&card.name).or_insert((0, memory));
        *count += card.count;
        if is_fuller(memory, *fullest) {
            *fullest = memory;
        }
    }
    let gib = |bytes: i64| bytes as f64 / (1_u64 << 30) as f64;
    let words = names.into_iter().map(|(name, (count, (used, total)))| {
        format!("{count} x {name}, {:.1}/{:.1} GiB", gib(used), gib(total))
    });
    super::cut(words.collect::<Vec<_>>().join("; "), 256)
}
