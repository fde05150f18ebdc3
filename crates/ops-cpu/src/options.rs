//! What a CPU backend is made from: numerics class, threads, instruction set.

use std::{fmt, time::Duration};

use cadre_types::NumericsClass;

/// An instruction set that kernels exist for. All give the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Portable Rust.
    Scalar,
    /// AVX2 with FMA.
    Avx2,
    /// AVX-512 F, BW, DQ and VL, with all of [`Isa::Avx2`].
    Avx512,
}

impl Isa {
    /// Every instruction set, slowest first.
    pub const ALL: [Self; 3] = [Self::Scalar, Self::Avx2, Self::Avx512];

    /// Whether this machine has it.
    pub fn available(self) -> bool {
        match self {
            Self::Scalar => true,
            Self::Avx2 => has_avx2(),
            Self::Avx512 => has_avx2() && has_avx512(),
        }
    }

    /// The fastest that this machine has.
    pub fn best() -> Self {
        Self::ALL.into_iter().rev().find(|isa| isa.available()).unwrap_or(Self::Scalar)
    }

    /// Name for logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(target_arch = "x86_64")]
fn has_avx2() -> bool {
    std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma")
}

#[cfg(target_arch = "x86_64")]
fn has_avx512() -> bool {
    std::is_x86_feature_detected!("avx512f")
        && std::is_x86_feature_detected!("avx512bw")
        && std::is_x86_feature_detected!("avx512dq")
        && std::is_x86_feature_detected!("avx512vl")
}

#[cfg(not(target_arch = "x86_64"))]
fn has_avx2() -> bool {
    false
}

#[cfg(not(target_arch = "x86_64"))]
fn has_avx512() -> bool {
    false
}

/// Options of [`CpuBackend::new`](crate::CpuBackend::new).
#[derive(Clone, Debug)]
pub struct CpuOptions {
    /// Numerics class of everything that the backend computes.
    pub class: NumericsClass,
    /// Threads including the caller's; `None` takes what the affinity mask and the cgroup's CPU limit allow.
    pub threads: Option<usize>,
    /// Instruction set; `None` takes [`Isa::best`].
    pub isa: Option<Isa>,
    /// How long an idle worker thread spins before it sleeps. Waking a sleeper costs several microseconds,
    /// spinning takes a core from whoever else shares the machine; consecutive operations of a step come
    /// a few microseconds apart.
    pub spin: Duration,
}

impl CpuOptions {
    /// Default of [`CpuOptions::spin`].
    pub const DEFAULT_SPIN: Duration = Duration::from_micros(20);

    /// Defaults for a class.
    pub fn new(class: NumericsClass) -> Self {
        Self { class, threads: None, isa: None, spin: Self::DEFAULT_SPIN }
    }
}

/// An instruction set was asked for that the machine lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this machine has no {0}: leave the choice to the backend or take {best}", best = Isa::best())]
pub struct UnsupportedIsa(pub Isa);
