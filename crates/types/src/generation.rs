//! The generation stamp: what every frame between processes must agree on.
//!
//! Two processes may exchange activations or KV only if they run the same weights in the same
//! numerics class under the same placement. The stamp travels on every frame and a difference is a
//! typed refusal, never a wrong answer.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::ids::PlacementEpoch;

/// A family of arithmetic whose members give the same bits (docs/numerics.md).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NumericsClass {
    /// Weights as stored (FP8 x scale or BF16), activations in F32: the golden reference.
    F32,
    /// Weights as stored, activations rounded to bf16 where docs/numerics.md says, F32 sums. The default.
    #[default]
    Bf16,
    /// As `Bf16`, and the inputs of FP8 matrices quantised to e4m3 per token and 128 channels.
    Fp8,
    /// The recipe of `Fp8` on the tensor cores of NVIDIA's Hopper: sums of its own, on such a device only.
    CudaFp8,
}

impl NumericsClass {
    /// The classes whose bits every backend gives, in a fixed order.
    pub const ALL: [Self; 3] = [Self::F32, Self::Bf16, Self::Fp8];

    /// Every class that has a name, in a fixed order.
    pub const NAMED: [Self; 4] = [Self::F32, Self::Bf16, Self::Fp8, Self::CudaFp8];

    /// Whether inputs of e4m3 matrices are quantised, and rows travel to experts as e4m3.
    pub fn quantises(self) -> bool {
        matches!(self, Self::Fp8 | Self::CudaFp8)
    }

    /// Whether the class is computed by CUDA devices alone.
    pub fn needs_cuda(self) -> bool {
        self == Self::CudaFp8
    }

    /// The name used on the command line, on the wire and in docs/numerics.md.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Fp8 => "fp8",
            Self::CudaFp8 => "cuda-fp8",
        }
    }
}

impl fmt::Display for NumericsClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that is no numerics class.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown numerics class {0:?}: expected f32, bf16, fp8 or cuda-fp8")]
pub struct UnknownNumericsClass(pub String);

impl FromStr for NumericsClass {
    type Err = UnknownNumericsClass;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        Self::NAMED
            .into_iter()
            .find(|class| class.name() == s)
            .ok_or_else(|| UnknownNumericsClass(s.to_owned()))
    }
}

/// Identifies a checkpoint: SHA-256 over its configuration, tensor tables and samples of its bytes,
/// cut to 16 bytes (cadre-checkpoint says exactly over what).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct ModelHash(pub [u8; 16]);

impl fmt::Display for ModelHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ModelHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ModelHash({self})")
    }
}

/// The stamp on every frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Generation {
    /// Which weights.
    pub model: ModelHash,
    /// Which arithmetic.
    pub numerics: NumericsClass,
    /// Which placement. KV frames, which no placement affects, carry the sender's and ignore it.
    pub epoch: PlacementEpoch,
}

impl Generation {
    /// Compares a peer's stamp with ours. `Ok` means that a frame may be used.
    pub fn check(&self, theirs: &Self) -> Result<(), GenerationMismatch> {
        self.check_weights(theirs)?;
        if self.epoch != theirs.epoch {
            return Err(GenerationMismatch::Epoch { ours: self.epoch, theirs: theirs.epoch });
        }
        Ok(())
    }

    /// As [`Self::check`], for frames that do not depend on a placement.
    pub fn check_weights(&self, theirs: &Self) -> Result<(), GenerationMismatch> {
        if self.model != theirs.model {
            return Err(GenerationMismatch::Model { ours: self.model, theirs: theirs.model });
        }
        if self.numerics != theirs.numerics {
            return Err(GenerationMismatch::Numerics { ours: self.numerics, theirs: theirs.numerics });
        }
        Ok(())
    }
}

/// Why a frame from another generation was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GenerationMismatch {
    /// The peer serves other weights.
    #[error("model hash {theirs} is not ours ({ours}): the peer serves another checkpoint")]
    Model {
        /// This process's checkpoint.
        ours: ModelHash,
        /// The peer's checkpoint.
        theirs: ModelHash,
    },
    /// The peer computes in another numerics class.
    #[error("numerics class {theirs} is not ours ({ours}): run every process of a model in one class")]
    Numerics {
        /// This process's class.
        ours: NumericsClass,
        /// The peer's class.
        theirs: NumericsClass,
    },
    /// The peer works from another placement.
    #[error("placement {theirs} is not ours ({ours})")]
    Epoch {
        /// This process's epoch.
        ours: PlacementEpoch,
        /// The peer's epoch.
        theirs: PlacementEpoch,
    },
}

impl GenerationMismatch {
    /// As the peer is told: the hash of our checkpoint stays here, or everybody who asks wrongly could answer
    /// rightly the next time. Our own log has both.
    pub fn to_peer(&self) -> String {
        match self {
            Self::Model { theirs, .. } => {
                format!("model hash {theirs} is not ours: you serve another checkpoint")
            }
            Self::Numerics { .. } | Self::Epoch { .. } => self.to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_difference_is_named_and_the_epoch_only_where_it_counts() {
        let ours =
            Generation { model: ModelHash([1; 16]), numerics: NumericsClass::Bf16, epoch: PlacementEpoch(4) };
        assert_eq!(ours.check(&ours), Ok(()));
        let epoch = Generation { epoch: PlacementEpoch(5), ..ours };
        assert_eq!(
            ours.check(&epoch).map_err(|e| e.to_string()),
            Err("placement epoch 5 is not ours (epoch 4)".into())
        );
        assert_eq!(ours.check_weights(&epoch), Ok(()));
        let numerics = Generation { numerics: NumericsClass::Fp8, ..ours };
        let model = Generation { model: ModelHash([2; 16]), ..ours };
        for theirs in [numerics, model] {
            assert!(ours.check_weights(&theirs).is_err());
            assert_eq!(ours.check(&theirs), ours.check_weights(&theirs));
        }
    }

    #[test]
    fn a_peer_is_told_its_own_hash_only() {
        let (ours, theirs) = (ModelHash([1; 16]), ModelHash([2; 16]));
        let mismatch = GenerationMismatch::Model { ours, theirs };
        assert!(mismatch.to_string().contains(&ours.to_string()), "the log has both");
        let told = mismatch.to_peer();
        assert!(told.contains(&theirs.to_string()) && !told.contains(&ours.to_string()), "{told}");
        let numerics = GenerationMismatch::Numerics { ours: NumericsClass::Bf16, theirs: NumericsClass::Fp8 };
        assert_eq!(numerics.to_peer(), numerics.to_string());
    }

    #[test]
    fn class_names_are_parsed_and_unknown_ones_refused() {
        for class in NumericsClass::NAMED {
            assert_eq!(class.name().parse(), Ok(class));
        }
        assert_eq!("int4".parse::<NumericsClass>(), Err(UnknownNumericsClass("int4".into())));
    }
}
