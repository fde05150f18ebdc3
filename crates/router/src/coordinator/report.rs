//! A member's report, read from the wire and checked for form.

use cadre_proto::{
    convert::{ConvertError, required},
    v1,
};
use cadre_types::{Generation, LayerId, Member};

use super::WorkerLoad;

/// Longest member id and address in bytes; both are logged and sent to everybody.
const MAX_NAME_BYTES: usize = 256;

/// One report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct MemberReport {
    pub(super) member: Member,
    /// Weights and numerics, and the epoch that the member has applied (0 before the first).
    pub(super) generation: Generation,
    /// Digest of the placement that the member has applied (0 before the first).
    pub(super) placement_digest: u64,
    pub(super) load: WorkerLoad,
    pub(super) loading: Option<Loading>,
    /// Tokens per expert since the last report, by layer.
    pub(super) expert_load: Vec<(LayerId, Vec<u64>)>,
}

/// Weights read so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub(super) struct Loading {
    pub(super) bytes_read: u64,
    pub(super) bytes_expected: u64,
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
        let generation = Generation::try_from(&required(wire.generation, "report.generation")?)?;
        let expert_load = wire
            .expert_load
            .into_iter()
            .map(|load| {
                let layer = u16::try_from(load.layer).map_err(|_| ConvertError::Invalid {
                    field: "report.expert_load.layer",
                    problem: format!("{} is out of range", load.layer),
                })?;
                Ok((LayerId(layer), load.tokens))
            })
            .collect::<Result<_, ConvertError>>()?;
        Ok(Self {
            member,
            generation,
            placement_digest: wire.placement_digest,
            load: wire.worker.map_or_else(WorkerLoad::default, |load| WorkerLoad {
                running_sequences: load.running_sequences,
                waiting_sequences: load.waiting_sequences,
                free_pages: load.free_pages,
                total_pages: load.total_pages,
            }),
            loading: wire.loading.map(|loading| Loading {
                bytes_read: loading.bytes_read,
                bytes_expected: loading.bytes_expected,
            }),
            expert_load,
        })
    }
}
