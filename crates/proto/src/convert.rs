//! Wire messages to nouns and back. Unknown numbers are errors that name the field.

use std::sync::Arc;

use bytes::Bytes;
use cadre_types as t;

use crate::v1;

/// A message that no correct peer sends.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConvertError {
    /// An enum field holds a number that this version does not know, or none.
    #[error("{field}: unknown value {value}")]
    UnknownEnum {
        /// Dotted field name.
        field: &'static str,
        /// The number received.
        value: i32,
    },
    /// A required message field is absent.
    #[error("{field}: missing")]
    Missing {
        /// Dotted field name.
        field: &'static str,
    },
    /// A field has an impossible value.
    #[error("{field}: {problem}")]
    Invalid {
        /// Dotted field name.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
}

impl From<ConvertError> for tonic::Status {
    fn from(error: ConvertError) -> Self {
        Self::invalid_argument(error.to_string())
    }
}

/// Takes a required message field.
pub fn required<T>(value: Option<T>, field: &'static str) -> Result<T, ConvertError> {
    value.ok_or(ConvertError::Missing { field })
}

fn narrow<T: TryFrom<u32>>(value: u32, field: &'static str) -> Result<T, ConvertError> {
    T::try_from(value)
        .map_err(|_| ConvertError::Invalid { field, problem: format!("{value} is out of range") })
}

impl From<t::NumericsClass> for v1::NumericsClass {
    fn from(class: t::NumericsClass) -> Self {
        match class {
            t::NumericsClass::F32 => Self::F32,
            t::NumericsClass::Bf16 => Self::Bf16,
            t::NumericsClass::Fp8 => Self::Fp8,
            t::NumericsClass::CudaFp8 => Self::CudaFp8,
        }
    }
}

fn numerics(value: i32) -> Result<t::NumericsClass, ConvertError> {
    match v1::NumericsClass::try_from(value) {
        Ok(v1::NumericsClass::F32) => Ok(t::NumericsClass::F32),
        Ok(v1::NumericsClass::Bf16) => Ok(t::NumericsClass::Bf16),
        Ok(v1::NumericsClass::Fp8) => Ok(t::NumericsClass::Fp8),
        Ok(v1::NumericsClass::CudaFp8) => Ok(t::NumericsClass::CudaFp8),
        Ok(v1::NumericsClass::Unspecified) | Err(_) => {
            Err(ConvertError::UnknownEnum { field: "generation.numerics", value })
        }
    }
}

impl From<t::Generation> for v1::Generation {
    fn from(generation: t::Generation) -> Self {
        Self {
            model_hash: Bytes::copy_from_slice(&generation.model.0),
            numerics: v1::NumericsClass::from(generation.numerics).into(),
            epoch: generation.epoch.0,
        }
    }
}

impl TryFrom<&v1::Generation> for t::Generation {
    type Error = ConvertError;

    fn try_from(wire: &v1::Generation) -> Result<Self, ConvertError> {
        let hash: [u8; 16] = wire.model_hash.as_ref().try_into().map_err(|_| ConvertError::Invalid {
            field: "generation.model_hash",
            problem: format!("{} bytes, expected 16", wire.model_hash.len()),
        })?;
        Ok(Self {
            model: t::ModelHash(hash),
            numerics: numerics(wire.numerics)?,
            epoch: t::PlacementEpoch(wire.epoch),
        })
    }
}

impl From<&t::SamplingParams> for v1::SamplingParams {
    fn from(params: &t::SamplingParams) -> Self {
        Self {
            temperature: params.temperature,
            top_p: params.top_p,
            top_k: params.top_k,
            min_p: params.min_p,
            repetition_penalty: params.repetition_penalty,
            presence_penalty: params.presence_penalty,
            frequency_penalty: params.frequency_penalty,
            seed: params.seed,
            logprobs: params.logprobs,
        }
    }
}

impl From<&v1::SamplingParams> for t::SamplingParams {
    fn from(wire: &v1::SamplingParams) -> Self {
        Self {
            temperature: wire.temperature,
            top_p: wire.top_p,
            top_k: wire.top_k,
            min_p: wire.min_p,
            repetition_penalty: wire.repetition_penalty,
            presence_penalty: wire.presence_penalty,
            frequency_penalty: wire.frequency_penalty,
            seed: wire.seed,
            logprobs: wire.logprobs,
        }
    }
}

impl From<t::FinishReason> for v1::FinishReason {
    /// `Error` has no wire value: a failed stream ends with a status instead.
    fn from(reason: t::FinishReason) -> Self {
        match reason {
            t::FinishReason::Stop => Self::Stop,
            t::FinishReason::Length => Self::Length,
            t::FinishReason::Cancelled => Self::Cancelled,
            t::FinishReason::Deadline => Self::Deadline,
            t::FinishReason::Error => Self::Unspecified,
        }
    }
}

/// Reads a finish reason.
pub fn finish_reason(value: i32) -> Result<t::FinishReason, ConvertError> {
    match v1::FinishReason::try_from(value) {
        Ok(v1::FinishReason::Stop) => Ok(t::FinishReason::Stop),
        Ok(v1::FinishReason::Length) => Ok(t::FinishReason::Length),
        Ok(v1::FinishReason::Cancelled) => Ok(t::FinishReason::Cancelled),
        Ok(v1::FinishReason::Deadline) => Ok(t::FinishReason::Deadline),
        Ok(v1::FinishReason::Unspecified) | Err(_) => {
            Err(ConvertError::UnknownEnum { field: "finish_reason", value })
        }
    }
}

impl From<t::MemberState> for v1::MemberState {
    fn from(state: t::MemberState) -> Self {
        match state {
            t::MemberState::Starting => Self::Starting,
            t::MemberState::Ready => Self::Ready,
            t::MemberState::Draining => Self::Draining,
        }
    }
}

impl From<&t::Member> for v1::Member {
    fn from(member: &t::Member) -> Self {
        let (role, shard) = match member.role {
            t::Role::Prefill => (v1::Role::Prefill, 0),
            t::Role::Decode => (v1::Role::Decode, 0),
            t::Role::Both => (v1::Role::Both, 0),
            t::Role::Expert(shard) => (v1::Role::Expert, u32::from(shard.0)),
        };
        Self {
            id: member.id.0.clone(),
            role: role.into(),
            shard,
            address: member.address.clone(),
            state: v1::MemberState::from(member.state).into(),
            pod: member.pod.as_ref().map(v1::PodRef::from),
        }
    }
}

impl TryFrom<&v1::Member> for t::Member {
    type Error = ConvertError;

    fn try_from(wire: &v1::Member) -> Result<Self, ConvertError> {
        let role = match v1::Role::try_from(wire.role) {
            Ok(v1::Role::Prefill) => t::Role::Prefill,
            Ok(v1::Role::Decode) => t::Role::Decode,
            Ok(v1::Role::Both) => t::Role::Both,
            Ok(v1::Role::Expert) => t::Role::Expert(t::ShardIndex(narrow(wire.shard, "member.shard")?)),
            Ok(v1::Role::Unspecified) | Err(_) => {
                return Err(ConvertError::UnknownEnum { field: "member.role", value: wire.role });
            }
        };
        let state = match v1::MemberState::try_from(wire.state) {
            Ok(v1::MemberState::Starting) => t::MemberState::Starting,
            Ok(v1::MemberState::Ready) => t::MemberState::Ready,
            Ok(v1::MemberState::Draining) => t::MemberState::Draining,
            Ok(v1::MemberState::Unspecified) | Err(_) => {
                return Err(ConvertError::UnknownEnum { field: "member.state", value: wire.state });
            }
        };
        let pod = wire.pod.as_ref().map(t::PodRef::try_from).transpose()?;
        Ok(Self { id: t::MemberId(wire.id.clone()), role, address: wire.address.clone(), state, pod })
    }
}

impl From<&t::Placement> for v1::Placement {
    fn from(placement: &t::Placement) -> Self {
        let layers = placement.layers().iter().map(|layer| v1::LayerPlacement {
            layer: u32::from(layer.layer.0),
            shards: layer
                .slots
                .iter()
                .map(|slots| v1::ShardSlots {
                    experts: slots.iter().map(|expert| u32::from(expert.0)).collect(),
                })
                .collect(),
        });
        Self {
            epoch: placement.epoch().0,
            num_experts: placement.num_experts() as u32,
            layers: layers.collect(),
        }
    }
}

impl TryFrom<&v1::Placement> for t::Placement {
    type Error = ConvertError;

    fn try_from(wire: &v1::Placement) -> Result<Self, ConvertError> {
        let shard_slots = |slots: &v1::ShardSlots| {
            slots
                .experts
                .iter()
                .map(|&expert| Ok(t::LogicalExpert(narrow(expert, "placement.layers.shards.experts")?)))
                .collect::<Result<Vec<_>, ConvertError>>()
        };
        let layers = wire
            .layers
            .iter()
            .map(|layer| {
                Ok(t::LayerPlacement {
                    layer: t::LayerId(narrow(layer.layer, "placement.layers.layer")?),
                    slots: layer.shards.iter().map(shard_slots).collect::<Result<_, ConvertError>>()?,
                })
            })
            .collect::<Result<Vec<_>, ConvertError>>()?;
        // Bounded before anything is allocated by it: expert ids have 16 bits.
        let num_experts: u16 = narrow(wire.num_experts, "placement.num_experts")?;
        Self::new(t::PlacementEpoch(wire.epoch), usize::from(num_experts), layers)
            .map_err(|error| ConvertError::Invalid { field: "placement", problem: error.to_string() })
    }
}

impl From<&t::ClusterView> for v1::ClusterView {
    fn from(view: &t::ClusterView) -> Self {
        Self {
            generation: Some(view.generation.into()),
            placement: Some((&*view.placement).into()),
            members: view.members.iter().map(v1::Member::from).collect(),
            next: view.next.as_deref().map(v1::Placement::from),
            oldest_epoch: view.oldest_epoch.0,
        }
    }
}

impl TryFrom<&v1::ClusterView> for t::ClusterView {
    type Error = ConvertError;

    fn try_from(wire: &v1::ClusterView) -> Result<Self, ConvertError> {
        let generation = required(wire.generation.as_ref(), "view.generation")?;
        let placement = required(wire.placement.as_ref(), "view.placement")?;
        Ok(Self {
            generation: generation.try_into()?,
            placement: Arc::new(placement.try_into()?),
            next: wire.next.as_ref().map(t::Placement::try_from).transpose()?.map(Arc::new),
            oldest_epoch: t::PlacementEpoch(wire.oldest_epoch),
            members: wire.members.iter().map(t::Member::try_from).collect::<Result<_, _>>()?,
        })
    }
}

mod operate;

#[cfg(test)]
mod tests;
