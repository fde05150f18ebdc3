//! Numbers that follow from a spec, for the plan and for whoever else needs them; the rules in
//! [`crate::rules`] say the same in CEL. And one way to reach the tiers by name.

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::ResourceExt;

use super::{
    Accelerator, ClaimSource, HostPath, ImagePath, ImageVolume, MoEModel, MoEModelSpec, ModelSource, PodSpec,
    Resources, RouterSpec, WorkerTierSpec,
};
use crate::names::Tier;

/// The source that is given, as an enum that cannot be two things.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum SourceRef<'a> {
    /// [`ModelSource::image`]
    Image(&'a ImagePath),
    /// [`ModelSource::persistent_volume_claim`]
    Claim(&'a ClaimSource),
    /// [`ModelSource::host_path`]
    Host(&'a HostPath),
    /// [`ModelSource::image_volume`]
    ImageVolume(&'a ImageVolume),
}

impl MoEModel {
    /// Name under which clients ask for the model.
    pub fn served_name(&self) -> String {
        self.spec.model.served_name.clone().unwrap_or_else(|| self.name_any())
    }
}

impl MoEModelSpec {
    /// Slots per layer: one for each routed expert and the redundant ones.
    pub fn slots(&self) -> i64 {
        i64::from(self.model.routed_experts) + i64::from(self.experts.redundant_slots)
    }

    /// The slots divide evenly among so many shards, and the shards are enough for the copies.
    pub fn fits_shards(&self, shards: i32) -> bool {
        shards >= self.experts.min_copies.max(1)
            && self.slots() % i64::from(shards) == 0
            && i64::from(self.experts.redundant_slots)
                <= i64::from(self.model.routed_experts) * (i64::from(shards) - 1)
    }

    /// The largest number of shards up to `limit` that [fits](Self::fits_shards), if there is one.
    pub fn largest_fitting_shards(&self, limit: i32) -> Option<i32> {
        (1..=limit).rev().find(|shards| self.fits_shards(*shards))
    }

    /// Pods that the spec asks for.
    pub fn declared_replicas(&self, tier: Tier) -> i32 {
        match tier {
            Tier::Prefill => self.prefill.replicas,
            Tier::Decode => self.decode.replicas,
            Tier::Experts => self.experts.shards,
        }
    }

    /// Accelerator of the tier's pods.
    pub fn accelerator(&self, tier: Tier) -> Option<&Accelerator> {
        match tier {
            Tier::Prefill => self.prefill.accelerator.as_ref(),
            Tier::Decode => self.decode.accelerator.as_ref(),
            Tier::Experts => self.experts.accelerator.as_ref(),
        }
    }

    /// Accelerators of one pod of the tier.
    pub fn gpus_per_pod(&self, tier: Tier) -> i64 {
        self.accelerator(tier).map_or(0, |accelerator| accelerator.count.into())
    }

    /// Accelerators of all tiers as declared.
    pub fn gpus(&self) -> i64 {
        Tier::ALL
            .into_iter()
            .map(|tier| i64::from(self.declared_replicas(tier)) * self.gpus_per_pod(tier))
            .sum()
    }

    /// Where the tier's pods run and what they may use.
    pub fn pod(&self, tier: Tier) -> &PodSpec {
        match tier {
            Tier::Prefill => &self.prefill.pod,
            Tier::Decode => &self.decode.pod,
            Tier::Experts => &self.experts.pod,
        }
    }

    /// The tier as one of workers; experts are none.
    pub fn worker(&self, tier: Tier) -> Option<&WorkerTierSpec> {
        match tier {
            Tier::Prefill => Some(&self.prefill),
            Tier::Decode => Some(&self.decode),
            Tier::Experts => None,
        }
    }

    /// KV cache of one pod of the tier; shards have one if there is a worker beside them.
    pub fn kv_cache(&self, tier: Tier) -> Option<&Quantity> {
        match tier {
            Tier::Prefill => Some(&self.prefill.kv_cache),
            Tier::Decode => Some(&self.decode.kv_cache),
            Tier::Experts => self.experts.worker.as_ref().map(|worker| &worker.kv_cache),
        }
    }
}

impl ModelSource {
    /// The source that is given; `None` if none or several are, which admission refuses.
    pub fn given(&self) -> Option<SourceRef<'_>> {
        let mut given = [
            self.image.as_ref().map(SourceRef::Image),
            self.persistent_volume_claim.as_ref().map(SourceRef::Claim),
            self.host_path.as_ref().map(SourceRef::Host),
            self.image_volume.as_ref().map(SourceRef::ImageVolume),
        ]
        .into_iter()
        .flatten();
        let only = given.next()?;
        given.next().is_none().then_some(only)
    }
}

impl RouterSpec {
    pub(super) fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl Resources {
    pub(super) fn is_default(&self) -> bool {
        *self == Self::default()
    }
}
