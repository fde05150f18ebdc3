//! The dispatcher's links: one per shard of the placement in force, with what is believed of each.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use cadre_types::{ClusterView, LayerId, LogicalExpert, MemberState, PlacementEpoch, Role, ShardIndex};

use super::{mailbox::Mailbox, step::InFlight};
use crate::{
    frame::{DispatchFrame, LinkError},
    health::{Failure, HealthPolicy, Peers, Sample, ShardHealth},
    stats::{DispatchStats, ShardFault, ShardStats, add},
    transport::{Connect, Reply},
};

mod link;

use link::{Link, Listed};

pub(super) struct Links {
    policy: HealthPolicy,
    connector: Arc<dyn Connect>,
    mailbox: Arc<Mailbox>,
    stats: Arc<DispatchStats>,
    view: Option<Arc<ClusterView>>,
    /// By shard index; `None` for a shard that was never listed.
    links: Vec<Option<Link>>,
    health: Vec<ShardHealth>,
    shard_stats: Vec<Arc<ShardStats>>,
    /// Probes that are out, and since when: at most one per shard.
    probes: Vec<(u64, ShardIndex, Instant)>,
    /// Experts whose rows were not finite, by shard: probed with a row of ones until that comes back finite.
    suspects: Vec<ShardFault>,
}

impl Links {
    pub(super) fn new(
        policy: HealthPolicy,
        connector: Arc<dyn Connect>,
        mailbox: Arc<Mailbox>,
        stats: Arc<DispatchStats>,
    ) -> Self {
        Self {
            policy,
            connector,
            mailbox,
            stats,
            view: None,
            links: Vec::new(),
            health: Vec::new(),
            shard_stats: Vec::new(),
            probes: Vec::new(),
            suspects: Vec::new(),
        }
    }

    /// The view in force.
    pub(super) fn view(&self) -> Option<&Arc<ClusterView>> {
        self.view.as_ref()
    }

    /// Its epoch.
    pub(super) fn epoch(&self) -> PlacementEpoch {
        self.view.as_ref().map_or(PlacementEpoch(0), |view| view.placement.epoch())
    }

    pub(super) fn health(&self) -> &[ShardHealth] {
        &self.health
    }

    pub(super) fn health_mut(&mut self, shard: ShardIndex) -> &mut ShardHealth {
        self.grow(shard.index() + 1);
        &mut self.health[shard.index()]
    }

    pub(super) fn stats(&self, shard: ShardIndex) -> Arc<ShardStats> {
        self.shard_stats.get(shard.index()).cloned().unwrap_or_else(|| self.stats.shard(shard))
    }

    fn grow(&mut self, shards: usize) {
        while self.links.len() < shards {
            let shard = ShardIndex(self.links.len() as u16);
            self.links.push(None);
            self.health.push(ShardHealth::default());
            self.shard_stats.push(self.stats.shard(shard));
        }
    }

    /// Takes up a view if it is new: links to new addresses, those of the next placement included, so that
    /// they are up when it comes into force; and no link to shards that no placement in use has any more.
    /// Returns the shards that were listed before and are not now.
    pub(super) fn follow(&mut self, view: &Arc<ClusterView>, now: Instant) -> Vec<ShardIndex> {
        if self.view.as_ref().is_some_and(|known| Arc::ptr_eq(known, view)) {
            return Vec::new();
        }
        let before = self.view.replace(view.clone()).map_or(0, |known| known.placement.num_shards());
        let placed = view.placement.num_shards();
        let shards = placed.max(view.next.as_ref().map_or(0, |next| next.num_shards()));
        self.grow(shards);
        // Frames of an older placement may be out; nobody is left on it once the oldest epoch has moved.
        if view.oldest_epoch >= view.placement.epoch() {
            self.links.truncate(shards);
            self.health.truncate(shards);
            self.shard_stats.truncate(shards);
            self.probes.retain(|probe| probe.1.index() < shards);
            self.stats.forget_from(shards);
        }
        // What failed them before they were in the placement says little about them now.
        for joined in self.health.iter_mut().take(placed).skip(before) {
            joined.link_up(now);
        }
        let mut expired = Vec::new();
        let mut listed = vec![Vec::new(); shards];
        for member in &view.members {
            if let Role::Expert(shard) = member.role
                && let Some(of_shard) = listed.get_mut(shard.index())
            {
                of_shard.push(Listed { address: &member.address, ready: member.state == MemberState::Ready });
            }
        }
        // What was wrong with a process that is gone says nothing about its successor.
        self.keep_suspects(|suspect| {
            let listed = listed.get(suspect.shard.index());
            listed.is_some_and(|of_shard| {
                of_shard.is_empty() || of_shard.iter().any(|member| member.address == suspect.address)
            })
        });
        for (index, listed) in listed.iter().enumerate() {
            let shard = ShardIndex(index as u16);
            if listed.is_empty() {
                if self.links[index].as_mut().is_some_and(Link::unlist) {
                    expired.push(shard);
                }
            } else if self.relist(shard, listed) {
                self.begin_anew(shard);
            }
        }
        self.notice_ups(now);
        expired
    }

    /// True if another member is used from now on.
    fn relist(&mut self, shard: ShardIndex, listed: &[Listed<'_>]) -> bool {
        let (connector, mailbox) = (&self.connector, &self.mailbox);
        let connect = |address: &str| {
            tracing::debug!(%shard, address, "linking to shard");
            let mailbox = Arc::clone(mailbox);
            connector.connect(shard, address, Arc::new(move || mailbox.wake()))
        };
        match &mut self.links[shard.index()] {
            Some(link) => link.relist(listed, connect),
            unlinked => {
                *unlinked = Link::new(listed, connect);
                true
            }
        }
    }

    /// What was believed of one process does not hold for another.
    fn begin_anew(&mut self, shard: ShardIndex) {
        let index = shard.index();
        let outstanding = self.health[index].outstanding();
        self.health[index] = ShardHealth::default();
        self.health[index].sent(outstanding as usize);
        if let Some(link) = &mut self.links[index] {
            link.was_up = link.is_up();
            tracing::debug!(%shard, address = link.address(), "the shard is asked at another address");
        }
    }

    /// Brings probes of shards forward whose link has come up.
    pub(super) fn notice_ups(&mut self, now: Instant) {
        for index in 0..self.links.len() {
            let Some(link) = &mut self.links[index] else { continue };
            if link.choose() {
                self.begin_anew(ShardIndex(index as u16));
                continue;
            }
            let up = link.is_up();
            if up && !link.was_up {
                self.health[index].link_up(now);
            }
            link.was_up = up;
        }
        self.publish();
    }

    /// Whether frames may go to a shard.
    pub(super) fn usable(&self, shard: usize) -> bool {
        let ready = |link: &Link| link.is_ready() && link.is_up();
        self.health.get(shard).is_some_and(ShardHealth::admitted)
            && self.links[shard].as_ref().is_some_and(ready)
    }

    /// Brings the gauges up to date.
    pub(super) fn publish(&self) {
        for (shard, stats) in self.shard_stats.iter().enumerate() {
            let usable = u64::from(self.usable(shard));
            stats.usable.store(usable, Ordering::Relaxed);
            let avoided = self.health.get(shard).is_some_and(|known| known.admitted() && !known.preferred());
            stats.avoided.store(u64::from(avoided), Ordering::Relaxed);
        }
    }

    pub(super) fn send(&self, shard: ShardIndex, frame: DispatchFrame, reply: Reply) {
        match self.links.get(shard.index()).and_then(Option::as_ref).and_then(Link::transport) {
            Some(transport) => transport.send(frame, reply),
            None => reply.send(Err(LinkError::Disconnected(format!("{shard} was never listed")))),
        }
    }

    /// Takes a frame's tokens off its shard's outstanding ones, once.
    pub(super) fn release(&mut self, frame: &mut InFlight) {
        let tokens = std::mem::take(&mut frame.outstanding);
        self.health_mut(frame.shard).settled(tokens);
    }

    pub(super) fn computed(&mut self, shard: ShardIndex, now: Instant, sample: Sample) {
        let policy = self.policy;
        let was_admitted = self.health_mut(shard).admitted();
        self.health_mut(shard).computed(&policy, now, sample);
        if !was_admitted {
            tracing::info!(%shard, "shard is back: it answered a frame that had been given up");
            self.publish();
        }
    }

    pub(super) fn failed(&mut self, shard: ShardIndex, failure: Failure, now: Instant, what: &str) {
        let policy = self.policy;
        let changed = self.health_mut(shard).failed(&policy, now, failure);
        let stats = self.stats(shard);
        add(&stats.failures[failure.index()], 1);
        if changed {
            if failure == Failure::Slow {
                tracing::warn!(%shard, what, "shard is slow: others are asked where they can");
            } else {
                tracing::warn!(%shard, failure = failure.name(), what, "shard taken out");
            }
            add(&stats.ejections, 1);
            self.pass_on(shard);
            self.publish();
        }
    }

    /// What shards are like, for judging the frames of one exchange.
    pub(super) fn peers(&self) -> Option<Peers> {
        Peers::of(&self.health)
    }

    /// After how long a frame is slow that was just counted as sent to this shard.
    pub(super) fn slow_after(&self, peers: &Peers, shard: ShardIndex, now: Instant) -> Duration {
        let load = self.health.get(shard.index()).map_or(0, |health| health.load(&self.policy, now));
        peers.slow_after(&self.policy, load)
    }

    /// Whether another shard that is like others has a copy and may be asked.
    pub(super) fn has_other(&self, layer: LayerId, expert: LogicalExpert, than: ShardIndex) -> bool {
        let placement = self.view.as_ref().map(|view| &view.placement);
        let replicas = placement.map_or(&[][..], |placement| placement.replicas(layer, expert));
        replicas.iter().map(|replica| replica.shard).any(|shard| {
            shard != than && self.usable(shard.index()) && self.health[shard.index()].preferred()
        })
    }

    /// Whether a shard waits for probes.
    pub(super) fn any_to_probe(&self) -> bool {
        !self.health.iter().all(ShardHealth::preferred)
    }

    /// The member of a shard that was taken out makes room for another one, if there is one.
    fn pass_on(&mut self, shard: ShardIndex) {
        if let Some(Some(link)) = self.links.get_mut(shard.index())
            && link.next()
        {
            self.begin_anew(shard);
        }
    }

    /// Shards whose probe is due; each is now being probed.
    pub(super) fn take_due_probes(&mut self, now: Instant) -> Vec<ShardIndex> {
        let mut due = Vec::new();
        for (index, health) in self.health.iter_mut().enumerate() {
            let up = self.links[index].as_ref().is_some_and(Link::is_up);
            if up && health.take_due_probe(&self.policy, now) {
                due.push(ShardIndex(index as u16));
            }
        }
        due
    }

    /// An expert of a shard answered rows that are not finite.
    pub(super) fn suspect(&mut self, shard: ShardIndex, layer: LayerId, expert: LogicalExpert) {
        let link = self.links.get(shard.index()).and_then(Option::as_ref);
        let address = link.and_then(Link::address).unwrap_or_default().to_owned();
        self.suspects.retain(|suspect| suspect.shard != shard);
        self.suspects.push(ShardFault { shard, address, layer, expert });
        self.stats.set_faults(self.suspects.clone());
    }

    /// The expert, and its slot under the placement in force, that a probe of this shard must prove.
    pub(super) fn suspected(&self, shard: ShardIndex) -> Option<(LayerId, u32)> {
        let &ShardFault { layer, expert, .. } =
            self.suspects.iter().find(|suspect| suspect.shard == shard)?;
        let replicas = self.view.as_ref()?.placement.replicas(layer, expert);
        let slot = replicas.iter().find(|replica| replica.shard == shard)?.slot;
        Some((layer, u32::from(slot.0)))
    }

    fn clear(&mut self, shard: ShardIndex) {
        self.keep_suspects(|suspect| suspect.shard != shard);
    }

    fn keep_suspects(&mut self, keep: impl Fn(&ShardFault) -> bool) {
        let before = self.suspects.len();
        self.suspects.retain(keep);
        if self.suspects.len() < before {
            self.stats.set_faults(self.suspects.clone());
        }
    }

    /// A shard is not to blame for what it was taken out for.
    pub(super) fn absolve(&mut self, shard: ShardIndex) {
        self.clear(shard);
        self.health_mut(shard).absolve();
        self.publish();
    }

    pub(super) fn probing(&mut self, sequence: u64, shard: ShardIndex, now: Instant) {
        self.probes.retain(|(_, probed, _)| *probed != shard);
        self.probes.push((sequence, shard, now));
    }

    /// The shard that a probe was for, and when it was sent.
    pub(super) fn take_probe(&mut self, sequence: u64) -> Option<(ShardIndex, Instant)> {
        let at = self.probes.iter().position(|(probe, ..)| *probe == sequence)?;
        let (_, shard, sent) = self.probes.swap_remove(at);
        Some((shard, sent))
    }

    pub(super) fn probed(&mut self, shard: ShardIndex, sent: Instant, now: Instant, passed: bool) {
        let policy = self.policy;
        let bound = self.peers().map(|peers| self.slow_after(&peers, shard, now));
        let in_time = bound.is_none_or(|bound| now.saturating_duration_since(sent) < bound);
        if passed {
            self.clear(shard);
        }
        if self.health_mut(shard).probed(&policy, now, passed, in_time) {
            tracing::info!(%shard, "shard is back: it answered its probes");
            self.publish();
        }
    }

    /// Shards that hold copies of an expert.
    pub(super) fn copies(&self, layer: LayerId, expert: LogicalExpert) -> Vec<ShardIndex> {
        let placement = self.view.as_ref().map(|view| &view.placement);
        let replicas = placement.map_or(&[][..], |placement| placement.replicas(layer, expert));
        replicas.iter().map(|replica| replica.shard).collect()
    }

    /// A shard and its address, for errors.
    pub(super) fn name(&self, shard: ShardIndex) -> String {
        match self.links.get(shard.index()).and_then(Option::as_ref) {
            Some(link) => format!("{shard} at {}", link.address().unwrap_or("no address")),
            None => shard.to_string(),
        }
    }

    /// Why a shard is not used, for errors.
    pub(super) fn describe(&self, shard: ShardIndex, now: Instant) -> String {
        let Some(link) = self.links.get(shard.index()).and_then(Option::as_ref) else {
            return format!("{shard} was never listed");
        };
        let at = link.address().unwrap_or("no address");
        if !link.is_up() {
            return format!("{shard} at {at} is not connected");
        }
        if !link.is_ready() {
            return format!("{shard} at {at} is not ready");
        }
        match self.health.get(shard.index()).and_then(ShardHealth::next_probe) {
            Some(_) if self.health[shard.index()].admitted() => format!("{shard} at {at} is slow but usable"),
            Some(next) => {
                let wait = next.saturating_duration_since(now).as_millis();
                format!("{shard} at {at} is taken out, next probe in {wait} ms")
            }
            None => format!("{shard} at {at} is usable"),
        }
    }

    /// When the next probe of a shard whose link is up is due.
    pub(super) fn next_probe(&self) -> Option<Instant> {
        let up = |index: usize| self.links[index].as_ref().is_some_and(Link::is_up);
        let probes = self.health.iter().enumerate().filter(|(index, _)| up(*index));
        probes.filter_map(|(_, health)| health.next_probe()).min()
    }
}

#[cfg(test)]
mod tests;
