//! A shard for those who do not care what it computes on.

use std::{
    collections::BTreeMap,
    fmt::Debug,
    sync::atomic::AtomicBool,
    time::{Duration, Instant},
};

use cadre_dispatch::ShardService;
use cadre_model::ExpertKey;
use cadre_ops::Backend;
use cadre_types::{Placement, PlacementEpoch};

use crate::{
    self_test::SelfTestError,
    shard::{ApplyError, Progress, Shard},
    stats::ShardStats,
};

/// The operations of a [`Shard`], whatever its backend; each is that of the same name.
pub trait AnyShard: ShardService + Debug {
    /// See [`Shard::hold`].
    fn hold(&self, placement: &Placement, given_up: &AtomicBool) -> Result<(), ApplyError>;

    /// See [`Shard::holds`].
    fn holds(&self, placement: &Placement) -> bool;

    /// See [`Shard::put_in_force`].
    fn put_in_force(&self, epoch: PlacementEpoch);

    /// See [`Shard::release`].
    fn release(&self, wanted: &dyn Fn(PlacementEpoch) -> bool);

    /// See [`Shard::epochs`].
    fn epochs(&self) -> Vec<PlacementEpoch>;

    /// See [`Shard::epoch`].
    fn epoch(&self) -> Option<PlacementEpoch>;

    /// See [`Shard::progress`].
    fn progress(&self) -> Progress;

    /// See [`Shard::resident`].
    fn resident(&self) -> (usize, u64);

    /// See [`Shard::digests`].
    fn digests(&self) -> BTreeMap<ExpertKey, u64>;

    /// See [`Shard::self_test`].
    fn self_test(&self, epoch: PlacementEpoch, timeout: Duration) -> Result<(), SelfTestError>;

    /// See [`Shard::drain`].
    fn drain(&self);

    /// See [`Shard::wait_idle`].
    fn wait_idle(&self, deadline: Instant) -> bool;

    /// See [`Shard::stop`].
    fn stop(&self);

    /// See [`Shard::is_dead`].
    fn is_dead(&self) -> bool;

    /// See [`Shard::queued_pairs`].
    fn queued_pairs(&self) -> usize;

    /// See [`Shard::stats`].
    fn stats(&self) -> &ShardStats;
}

impl<B: Backend> AnyShard for Shard<B> {
    fn hold(&self, placement: &Placement, given_up: &AtomicBool) -> Result<(), ApplyError> {
        Self::hold(self, placement, given_up)
    }

    fn holds(&self, placement: &Placement) -> bool {
        Self::holds(self, placement)
    }

    fn put_in_force(&self, epoch: PlacementEpoch) {
        Self::put_in_force(self, epoch);
    }

    fn release(&self, wanted: &dyn Fn(PlacementEpoch) -> bool) {
        Self::release(self, wanted);
    }

    fn epochs(&self) -> Vec<PlacementEpoch> {
        Self::epochs(self)
    }

    fn epoch(&self) -> Option<PlacementEpoch> {
        Self::epoch(self)
    }

    fn progress(&self) -> Progress {
        Self::progress(self)
    }

    fn resident(&self) -> (usize, u64) {
        Self::resident(self)
    }

    fn digests(&self) -> BTreeMap<ExpertKey, u64> {
        Self::digests(self)
    }

    fn self_test(&self, epoch: PlacementEpoch, timeout: Duration) -> Result<(), SelfTestError> {
        Self::self_test(self, epoch, timeout)
    }

    fn drain(&self) {
        Self::drain(self);
    }

    fn wait_idle(&self, deadline: Instant) -> bool {
        Self::wait_idle(self, deadline)
    }

    fn stop(&self) {
        Self::stop(self);
    }

    fn is_dead(&self) -> bool {
        Self::is_dead(self)
    }

    fn queued_pairs(&self) -> usize {
        Self::queued_pairs(self)
    }

    fn stats(&self) -> &ShardStats {
        Self::stats(self)
    }
}
