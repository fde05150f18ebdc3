//! A member's report, read from the wire and checked for form.

use cadre_proto::{
    convert::{ConvertError, required},
    v1,
};
use cadre_types::{
    Generation, HostPort, LayerId, LoadProgress, LogicalExpert, Member, MemberDevice, Placement,
    PlacementEpoch, ShardIndex,
};

use super::{WorkerLoad, digests::ReportedDigests, layouts::Stamp};

/// Longest member id and address in bytes; both are logged and sent to everybody.
const MAX_NAME_BYTES: usize = 256;

/// Longest description of weights: every field of a configuration overridden is some 1,500 bytes.
const MAX_WORDS_BYTES: usize = 4096;

/// Highest epoch. They count plans, one by one: at one a second these are nine million years.
pub(super) const MAX_EPOCH: u64 = 1 << 48;

/// Most tokens of one expert between two reports: what a hundred thousand a second make in four months, should
/// the coordinator have been away for so long.
const MAX_TOKENS: u64 = 1 << 40;

/// One report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct MemberReport {
    pub(super) member: Member,
    /// Weights and numerics, and the epoch that the member has applied (0 before the first).
    pub(super) generation: Generation,
    /// Digest of the placement that the member has applied (0 before the first).
    pub(super) placement_digest: u64,
    /// The placement that it holds beside that one.
    pub(super) prepared: Stamp,
    /// The placement that it has applied, whole; only in a stream's first report.
    pub(super) applied_placement: Option<Placement>,
    pub(super) load: WorkerLoad,
    pub(super) loading: Option<LoadProgress>,
    pub(super) device: Option<MemberDevice>,
    /// Where its weights come from, in its words; empty if it does not say.
    pub(super) weights: String,
    /// Tokens per expert since the last report, by layer.
    pub(super) expert_load: Vec<(LayerId, Vec<u64>)>,
    /// What it has read from the checkpoint, where the report says.
    pub(super) digests: ReportedDigests,
    /// Shards whose rows were not finite, by a worker's word.
    pub(super) faults: Vec<ReportedFault>,
}

/// What a worker says of a shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ReportedFault {
    pub(super) shard: ShardIndex,
    pub(super) address: String,
    pub(super) layer: LayerId,
    pub(super) expert: LogicalExpert,
}

impl MemberReport {
    /// Names the applied placement.
    pub(super) fn applied(&self) -> Stamp {
        Stamp { epoch: self.generation.epoch, digest: self.placement_digest }
    }
}

/// Faults, of which a shard has one.
fn faults(wire: Vec<v1::ShardFault>) -> Result<Vec<ReportedFault>, ConvertError> {
    let invalid = |problem: String| ConvertError::Invalid { field: "report.faults", problem };
    if wire.len() > usize::from(u16::MAX) {
        return Err(invalid(format!("{} of them, there are not as many shards", wire.len())));
    }
    let narrow = |what: &str, value: u32| {
        u16::try_from(value).map_err(|_| invalid(format!("{what} {value} is out of range")))
    };
    let fault = |fault: v1::ShardFault| {
        if fault.address.len() > MAX_NAME_BYTES {
            return Err(invalid(format!(
                "an address of {} bytes, at most {MAX_NAME_BYTES}",
                fault.address.len()
            )));
        }
        Ok(ReportedFault {
            shard: ShardIndex(narrow("shard", fault.shard)?),
            layer: LayerId(narrow("layer", fault.layer)?),
            expert: LogicalExpert(narrow("expert", fault.expert)?),
            address: fault.address,
        })
    };
    wire.into_iter().map(fault).collect()
}

impl TryFrom<v1::Report> for MemberReport {
    type Error = ConvertError;

    fn try_from(wire: v1::Report) -> Result<Self, ConvertError> {
        let member = Member::try_from(&required(wire.member, "report.member")?)?;
        for (field, text) in [("report.member.id", &member.id.0), ("report.member.address", &member.address)]
        {
            if text.is_empty() || text.len() > MAX_NAME_BYTES {
                let problem = format!("{} bytes, must be 1..={MAX_NAME_BYTES}", text.len());
                return Err(ConvertError::Invalid { field, problem });
            }
        }
        // It is logged, and everybody is told it.
        printable("report.member.id", &member.id.0)?;
        if let Err(error) = member.address.parse::<HostPort>() {
            let problem = error.to_string();
            return Err(ConvertError::Invalid { field: "report.member.address", problem });
        }
        let generation = Generation::try_from(&required(wire.generation, "report.generation")?)?;
        for (field, epoch) in
            [("report.generation.epoch", generation.epoch.0), ("report.prepared_epoch", wire.prepared_epoch)]
        {
            if epoch > MAX_EPOCH {
                let problem = format!("{epoch}, no cluster has counted beyond {MAX_EPOCH}");
                return Err(ConvertError::Invalid { field, problem });
            }
        }
        if let Some(load) = wire.worker.as_ref().filter(|load| load.free_pages > load.total_pages) {
            let problem = format!("{} of {} pages are free", load.free_pages, load.total_pages);
            return Err(ConvertError::Invalid { field: "report.worker.free_pages", problem });
        }
        let expert_load = wire
            .expert_load
            .into_iter()
            .map(|load| {
                let layer = u16::try_from(load.layer).map_err(|_| ConvertError::Invalid {
                    field: "report.expert_load.layer",
                    problem: format!("{} is out of range", load.layer),
                })?;
                if let Some(tokens) = load.tokens.iter().find(|tokens| **tokens > MAX_TOKENS) {
                    let problem = format!("{tokens} of layer {layer}, at most {MAX_TOKENS} are possible");
                    return Err(ConvertError::Invalid { field: "report.expert_load.tokens", problem });
                }
                Ok((LayerId(layer), load.tokens))
            })
            .collect::<Result<_, ConvertError>>()?;
        Ok(Self {
            member,
            generation,
            placement_digest: wire.placement_digest,
            prepared: Stamp { epoch: PlacementEpoch(wire.prepared_epoch), digest: wire.prepared_digest },
            applied_placement: wire.applied_placement.as_ref().map(Placement::try_from).transpose()?,
            load: wire.worker.map_or_else(WorkerLoad::default, |load| WorkerLoad {
                running_sequences: load.running_sequences,
                waiting_sequences: load.waiting_sequences,
                free_pages: load.free_pages,
                total_pages: load.total_pages,
            }),
            loading: wire.loading.map(LoadProgress::from),
            device: wire.device.map(device).transpose()?,
            weights: words("report.weights", wire.weights)?,
            expert_load,
            digests: ReportedDigests {
                experts: digests(&wire.expert_digests)?,
                weights: Some(wire.weights_digest).filter(|digest| *digest != 0),
            },
            faults: faults(wire.faults)?,
        })
    }
}

/// Names are logged and told to operators: short and printable.
fn device(wire: v1::MemberDevice) -> Result<MemberDevice, ConvertError> {
    for (field, text) in [
        ("report.device.device", &wire.device),
        ("report.device.name", &wire.name),
        ("report.device.architecture", &wire.architecture),
    ] {
        if text.is_empty() || text.len() > MAX_NAME_BYTES {
            let problem = format!("{} bytes, must be 1..={MAX_NAME_BYTES}", text.len());
            return Err(ConvertError::Invalid { field, problem });
        }
        printable(field, text)?;
    }
    Ok(wire.into())
}

/// Logged and told to the member: short and printable, perhaps empty.
fn words(field: &'static str, text: String) -> Result<String, ConvertError> {
    if text.len() > MAX_WORDS_BYTES {
        let problem = format!("{} bytes, at most {MAX_WORDS_BYTES}", text.len());
        return Err(ConvertError::Invalid { field, problem });
    }
    printable(field, &text)?;
    Ok(text)
}

fn printable(field: &'static str, text: &str) -> Result<(), ConvertError> {
    match text.bytes().position(|byte| !(b' '..=b'~').contains(&byte)) {
        Some(at) => {
            let problem = format!("byte {at} is no printable ASCII character");
            Err(ConvertError::Invalid { field, problem })
        }
        None => Ok(()),
    }
}

fn digests(wire: &[v1::LayerDigests]) -> Result<Vec<(LayerId, LogicalExpert, u64)>, ConvertError> {
    let field = "report.expert_digests";
    let mut all = Vec::new();
    for layer in wire {
        let out_of_range =
            |value| ConvertError::Invalid { field, problem: format!("{value} is out of range") };
        if layer.experts.len() != layer.digests.len() {
            let (experts, digests) = (layer.experts.len(), layer.digests.len());
            let problem = format!("layer {}: {experts} experts and {digests} digests", layer.layer);
            return Err(ConvertError::Invalid { field, problem });
        }
        let id = u16::try_from(layer.layer).map_err(|_| out_of_range(layer.layer))?;
        for (&expert, &digest) in layer.experts.iter().zip(&layer.digests) {
            let expert = u16::try_from(expert).map_err(|_| out_of_range(expert))?;
            all.push((LayerId(id), LogicalExpert(expert), digest));
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    fn wire() -> v1::Report {
        let member = v1::Member {
            id: "decode-127.0.0.1:7-1".into(),
            role: v1::Role::Decode.into(),
            address: "127.0.0.1:7".into(),
            state: v1::MemberState::Ready.into(),
            ..v1::Member::default()
        };
        let generation =
            Generation { model: Default::default(), numerics: Default::default(), epoch: PlacementEpoch(0) };
        v1::Report { member: Some(member), generation: Some(generation.into()), ..v1::Report::default() }
    }

    #[test]
    fn reports_that_cannot_be_are_refused_by_field() {
        MemberReport::try_from(wire()).unwrap();
        let refused = |change: &dyn Fn(&mut v1::Report)| {
            let mut report = wire();
            change(&mut report);
            MemberReport::try_from(report).unwrap_err().to_string()
        };
        let member =
            |change: &dyn Fn(&mut v1::Member)| refused(&|report| change(report.member.as_mut().unwrap()));
        let long = "x".repeat(MAX_NAME_BYTES + 1);
        let device = |change: &dyn Fn(&mut v1::MemberDevice)| {
            let [device, name, architecture] = ["cuda:0", "NVIDIA H200", "sm_90"].map(str::to_owned);
            let mut fine = v1::MemberDevice { device, name, architecture, memory_used: 1, memory_total: 2 };
            let mut report = wire();
            report.device = Some(fine.clone());
            MemberReport::try_from(report).unwrap();
            change(&mut fine);
            refused(&|report| report.device = Some(fine.clone()))
        };
        for (error, field) in [
            (member(&|member| member.id.clear()), "report.member.id: 0 bytes"),
            (member(&|member| member.id.clone_from(&long)), "report.member.id: 257 bytes"),
            (member(&|member| member.id = "a\nWARN forged".into()), "report.member.id: byte 1"),
            (member(&|member| member.id = "a\u{202e}b".into()), "report.member.id: byte 1"),
            (member(&|member| member.address = "127.0.0.1".into()), "report.member.address"),
            (member(&|member| member.address = "a\nb:1".into()), "report.member.address"),
            (member(&|member| member.address = "http://a:1".into()), "report.member.address"),
            (
                refused(&|report| report.generation.as_mut().unwrap().epoch = u64::MAX),
                "report.generation.epoch: 18446744073709551615",
            ),
            (refused(&|report| report.prepared_epoch = MAX_EPOCH + 1), "report.prepared_epoch"),
            (
                refused(&|report| {
                    report.worker =
                        Some(v1::WorkerLoad { free_pages: 2, total_pages: 1, ..v1::WorkerLoad::default() });
                }),
                "report.worker.free_pages: 2 of 1 pages",
            ),
            (
                refused(&|report| {
                    report.expert_load = vec![v1::LayerLoad { layer: 1, tokens: vec![0, u64::MAX] }]
                }),
                "report.expert_load.tokens: 18446744073709551615 of layer 1",
            ),
            (
                refused(&|report| report.expert_load = vec![v1::LayerLoad { layer: 70_000, tokens: vec![] }]),
                "report.expert_load.layer",
            ),
            (refused(&|report| report.weights = "x".repeat(4097)), "report.weights: 4097 bytes"),
            (refused(&|report| report.weights = "files\n".into()), "report.weights: byte 5"),
            (device(&|device| device.device.clear()), "report.device.device: 0 bytes"),
            (device(&|device| device.name.clone_from(&long)), "report.device.name: 257 bytes"),
            (device(&|device| device.architecture = "sm\n90".into()), "report.device.architecture: byte 2"),
        ] {
            assert!(error.contains(field), "{error} lacks {field}");
            assert!(!error.contains('\n'), "{error:?}");
        }
    }
}
