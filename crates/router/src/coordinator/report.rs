//! A member's report, read from the wire and checked for form.

use cadre_proto::{
    convert::{ConvertError, required},
    v1,
};
use cadre_types::{Generation, LayerId, LoadProgress, Member, Placement, PlacementEpoch};

use super::{WorkerLoad, layouts::Stamp};

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
    /// The placement that it holds beside that one.
    pub(super) prepared: Stamp,
    /// The placement that it has applied, whole; only in a stream's first report.
    pub(super) applied_placement: Option<Placement>,
    pub(super) load: WorkerLoad,
    pub(super) loading: Option<LoadProgress>,
    /// Tokens per expert since the last report, by layer.
    pub(super) expert_load: Vec<(LayerId, Vec<u64>)>,
}

impl MemberReport {
    /// Names the applied placement.
    pub(super) fn applied(&self) -> Stamp {
        Stamp { epoch: self.generation.epoch, digest: self.placement_digest }
    }
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
            prepared: Stamp { epoch: PlacementEpoch(wire.prepared_epoch), digest: wire.prepared_digest },
            applied_placement: wire.applied_placement.as_ref().map(Placement::try_from).transpose()?,
            load: wire.worker.map_or_else(WorkerLoad::default, |load| WorkerLoad {
                running_sequences: load.running_sequences,
                waiting_sequences: load.waiting_sequences,
                free_pages: load.free_pages,
                total_pages: load.total_pages,
            }),
            loading: wire.loading.map(LoadProgress::from),
            expert_load,
        })
    }
}
