//! The membership: who we are, and what every report carries.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::Result;
use cadre_device::DeviceMeter;
use cadre_dispatch::{LoadReport, Membership, MembershipOptions, membership};
use cadre_model::ExpertKey;
use cadre_proto::v1;
use cadre_shard::AnyShard;
use cadre_types::{Generation, Member, MemberId, MemberState, Role};

use crate::options::ExpertOptions;

/// Registers with the coordinator and keeps reporting.
pub(super) fn join(
    options: &ExpertOptions,
    address: String,
    weights: Generation,
    shard: &Arc<dyn AnyShard>,
    device: DeviceMeter,
) -> Result<Membership> {
    let born = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let member = Member {
        // Unique per process life.
        id: MemberId(format!("shard-{}-{:013x}-{address}", options.shard.0, born.as_millis())),
        role: Role::Expert(options.shard),
        address,
        state: MemberState::Starting,
        pod: options.pod.clone(),
    };
    let shard = Arc::downgrade(shard);
    let load = move || {
        let progress = shard.upgrade().map(|shard| shard.progress()).unwrap_or_default();
        let loading =
            v1::LoadProgress { bytes_read: progress.bytes_read, bytes_expected: progress.bytes_expected };
        LoadReport { loading: Some(loading), device: Some(device.read().into()), ..LoadReport::default() }
    };
    let to = MembershipOptions {
        secret: options.secret.clone(),
        weights: options.weights.to_string(),
        ..MembershipOptions::new(&options.coordinator)
    };
    Ok(membership::join(to, member, weights, load)?)
}

/// As reports carry them.
pub(super) fn layer_digests(digests: BTreeMap<ExpertKey, u64>) -> Vec<v1::LayerDigests> {
    let mut layers: Vec<v1::LayerDigests> = Vec::new();
    for (key, digest) in digests {
        let layer = u32::from(key.layer.0);
        if layers.last().is_none_or(|last| last.layer != layer) {
            layers.push(v1::LayerDigests { layer, ..v1::LayerDigests::default() });
        }
        if let Some(last) = layers.last_mut() {
            last.experts.push(u32::from(key.expert.0));
            last.digests.push(digest);
        }
    }
    layers
}
