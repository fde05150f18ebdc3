//! What the operator and the coordinator tell each other.
//!
//! Both sides send everything each time. Lists and texts come from another process, so each has a bound;
//! beyond it the message is refused by field name.

use cadre_types as t;

use super::{ConvertError, narrow, required};
use crate::v1;

/// Longest name, uid or domain in bytes: twice a DNS subdomain of Kubernetes, a label value has at most 63.
const MAX_NAME_BYTES: usize = 256;

/// Most pods of one model: every shard index twice (a rolling replacement), and as many workers.
const MAX_PODS: usize = 4 * 65_536;

/// Most addresses of one pod: Kubernetes gives one per family.
const MAX_IPS: usize = 8;

fn bounded(text: &str, least: usize, field: &'static str) -> Result<(), ConvertError> {
    if (least..=MAX_NAME_BYTES).contains(&text.len()) {
        return Ok(());
    }
    let problem = format!("{} bytes, must be {least}..={MAX_NAME_BYTES}", text.len());
    Err(ConvertError::Invalid { field, problem })
}

impl From<&t::PodRef> for v1::PodRef {
    fn from(pod: &t::PodRef) -> Self {
        Self { name: pod.name.clone(), uid: pod.uid.clone() }
    }
}

impl TryFrom<&v1::PodRef> for t::PodRef {
    type Error = ConvertError;

    fn try_from(wire: &v1::PodRef) -> Result<Self, ConvertError> {
        bounded(&wire.name, 1, "pod.name")?;
        bounded(&wire.uid, 1, "pod.uid")?;
        Ok(Self { name: wire.name.clone(), uid: wire.uid.clone() })
    }
}

impl From<t::Layout> for v1::Layout {
    fn from(layout: t::Layout) -> Self {
        Self {
            shards: u32::from(layout.shards),
            redundant_slots: layout.redundant_slots,
            min_copies: u32::from(layout.min_copies),
        }
    }
}

impl TryFrom<&v1::Layout> for t::Layout {
    type Error = ConvertError;

    fn try_from(wire: &v1::Layout) -> Result<Self, ConvertError> {
        let at_least_one = |value: u32, field| {
            let problem = || "0, must be at least 1".to_owned();
            match narrow::<u16>(value, field)? {
                0 => Err(ConvertError::Invalid { field, problem: problem() }),
                value => Ok(value),
            }
        };
        Ok(Self {
            shards: at_least_one(wire.shards, "layout.shards")?,
            redundant_slots: wire.redundant_slots,
            min_copies: at_least_one(wire.min_copies, "layout.min_copies")?,
        })
    }
}

impl From<&t::OperatorView> for v1::OperatorView {
    fn from(view: &t::OperatorView) -> Self {
        let pods = view.pods.iter().map(|pod| v1::PodView {
            pod: Some((&pod.pod).into()),
            domain: pod.domain.clone().unwrap_or_default(),
            withdrawn: pod.withdrawn,
            ips: pod.ips.clone(),
        });
        Self { layout: Some(view.layout.into()), pods: pods.collect() }
    }
}

impl TryFrom<&v1::OperatorView> for t::OperatorView {
    type Error = ConvertError;

    /// Pods come out sorted by uid; a uid that is there twice is refused.
    fn try_from(wire: &v1::OperatorView) -> Result<Self, ConvertError> {
        let invalid = |problem| ConvertError::Invalid { field: "operator_view.pods", problem };
        if wire.pods.len() > MAX_PODS {
            return Err(invalid(format!("{} pods, at most {MAX_PODS}", wire.pods.len())));
        }
        let pod = |pod: &v1::PodView| {
            bounded(&pod.domain, 0, "operator_view.pods.domain")?;
            if pod.ips.len() > MAX_IPS {
                let problem = format!("{} addresses, at most {MAX_IPS}", pod.ips.len());
                return Err(ConvertError::Invalid { field: "operator_view.pods.ips", problem });
            }
            pod.ips.iter().try_for_each(|ip| bounded(ip, 1, "operator_view.pods.ips"))?;
            Ok(t::PodView {
                pod: required(pod.pod.as_ref(), "operator_view.pods.pod")?.try_into()?,
                domain: Some(pod.domain.clone()).filter(|domain| !domain.is_empty()),
                withdrawn: pod.withdrawn,
                ips: pod.ips.clone(),
            })
        };
        let mut pods = wire.pods.iter().map(pod).collect::<Result<Vec<_>, ConvertError>>()?;
        pods.sort_by(|a, b| a.pod.uid.cmp(&b.pod.uid));
        if let Some(pair) = pods.windows(2).find(|pair| pair[0].pod.uid == pair[1].pod.uid) {
            return Err(invalid(format!("uid {} is there twice", pair[0].pod.uid)));
        }
        Ok(Self { layout: required(wire.layout.as_ref(), "operator_view.layout")?.try_into()?, pods })
    }
}

impl From<t::LoadProgress> for v1::LoadProgress {
    fn from(progress: t::LoadProgress) -> Self {
        Self { bytes_read: progress.bytes_read, bytes_expected: progress.bytes_expected }
    }
}

impl From<v1::LoadProgress> for t::LoadProgress {
    fn from(wire: v1::LoadProgress) -> Self {
        Self { bytes_read: wire.bytes_read, bytes_expected: wire.bytes_expected }
    }
}

impl From<t::MemberDevice> for v1::MemberDevice {
    fn from(on: t::MemberDevice) -> Self {
        let t::MemberDevice { device, name, architecture, memory_used, memory_total } = on;
        Self { device, name, architecture, memory_used, memory_total }
    }
}

impl From<v1::MemberDevice> for t::MemberDevice {
    fn from(wire: v1::MemberDevice) -> Self {
        let v1::MemberDevice { device, name, architecture, memory_used, memory_total } = wire;
        Self { device, name, architecture, memory_used, memory_total }
    }
}

impl From<&t::CoordinatorStatus> for v1::CoordinatorStatus {
    fn from(status: &t::CoordinatorStatus) -> Self {
        let members = status.members.iter().map(|member| v1::MemberStatus {
            member: Some((&member.member).into()),
            routable: member.routable,
            applied_epoch: member.applied.0,
            loading: member.loading.map(v1::LoadProgress::from),
            sequences: member.sequences,
            stranger: member.stranger.clone().unwrap_or_default(),
            device: member.device.clone().map(v1::MemberDevice::from),
            failed_proof: member.failed_proof.clone().unwrap_or_default(),
        });
        let next = status.next.as_ref().map(|next| v1::NextLayout {
            layout: Some(next.layout.into()),
            epoch: next.epoch.map_or(0, |epoch| epoch.0),
            waiting_for: next.waiting_for.clone(),
        });
        Self {
            generation: Some(status.generation.into()),
            layout: Some(status.layout.into()),
            next,
            members: members.collect(),
            coverage: Some((&status.coverage).into()),
            imbalance: status.imbalance,
            serving: status.serving,
        }
    }
}

impl TryFrom<&v1::CoordinatorStatus> for t::CoordinatorStatus {
    type Error = ConvertError;

    fn try_from(wire: &v1::CoordinatorStatus) -> Result<Self, ConvertError> {
        let member = |status: &v1::MemberStatus| {
            Ok(t::MemberStatus {
                member: required(status.member.as_ref(), "status.members.member")?.try_into()?,
                routable: status.routable,
                applied: t::PlacementEpoch(status.applied_epoch),
                loading: status.loading.map(t::LoadProgress::from),
                sequences: status.sequences,
                stranger: Some(status.stranger.clone()).filter(|why| !why.is_empty()),
                device: status.device.clone().map(t::MemberDevice::from),
                failed_proof: Some(status.failed_proof.clone()).filter(|what| !what.is_empty()),
            })
        };
        let next = |next: &v1::NextLayout| {
            Ok(t::NextLayout {
                layout: required(next.layout.as_ref(), "status.next.layout")?.try_into()?,
                epoch: Some(t::PlacementEpoch(next.epoch)).filter(|epoch| epoch.0 != 0),
                waiting_for: next.waiting_for.clone(),
            })
        };
        Ok(Self {
            generation: required(wire.generation.as_ref(), "status.generation")?.try_into()?,
            layout: required(wire.layout.as_ref(), "status.layout")?.try_into()?,
            next: wire.next.as_ref().map(next).transpose()?,
            members: wire.members.iter().map(member).collect::<Result<_, ConvertError>>()?,
            coverage: required(wire.coverage.as_ref(), "status.coverage")?.try_into()?,
            imbalance: wire.imbalance,
            serving: wire.serving,
        })
    }
}

impl From<&t::Coverage> for v1::Coverage {
    fn from(coverage: &t::Coverage) -> Self {
        let examples = coverage.examples.iter().map(|example| v1::CoverageExample {
            layer: u32::from(example.layer.0),
            expert: u32::from(example.expert.0),
            copies: example.copies,
            reason: example.reason.clone(),
        });
        Self {
            experts: coverage.experts,
            uncovered: coverage.uncovered,
            at_risk: coverage.at_risk,
            examples: examples.collect(),
        }
    }
}

impl TryFrom<&v1::Coverage> for t::Coverage {
    type Error = ConvertError;

    fn try_from(wire: &v1::Coverage) -> Result<Self, ConvertError> {
        let example = |example: &v1::CoverageExample| {
            Ok(t::CoverageExample {
                layer: t::LayerId(narrow(example.layer, "status.coverage.examples.layer")?),
                expert: t::LogicalExpert(narrow(example.expert, "status.coverage.examples.expert")?),
                copies: example.copies,
                reason: example.reason.clone(),
            })
        };
        Ok(Self {
            experts: wire.experts,
            uncovered: wire.uncovered,
            at_risk: wire.at_risk,
            examples: wire.examples.iter().map(example).collect::<Result<_, ConvertError>>()?,
        })
    }
}

#[cfg(test)]
mod tests;
