//! The table of entry points, and where their machine code lies.
//!
//! One table serves the loader, the test that compares it with the sources, and docs/gpu.md.

use std::path::{Path, PathBuf};

use crate::error::CudaError;

/// The architecture of the machine code, and the name of its folder.
pub const ARCHITECTURE: &str = "sm_90a";

/// Most shared memory that a thread block may ask for at launch on compute capability 9.0.
pub(crate) const SHARED_BYTES: u32 = 232_448;

/// What an entry point takes at a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// An address on the device (or of pinned host memory).
    Pointer,
    /// 32 bits, signed or not.
    U32,
    /// 64 bits, signed or not.
    U64,
    /// F32.
    F32,
    /// A structure of this many bytes.
    Struct(usize),
}

impl Kind {
    /// Bytes of the argument.
    pub fn bytes(self) -> usize {
        match self {
            Self::Pointer | Self::U64 => 8,
            Self::U32 | Self::F32 => 4,
            Self::Struct(bytes) => bytes,
        }
    }
}

/// One entry point.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// File without its extension, in `kernels/`.
    pub file: &'static str,
    /// Name.
    pub name: &'static str,
    /// Arguments in order.
    pub args: &'static [Kind],
    /// Whether launches ask for shared memory.
    pub shared: bool,
}

macro_rules! kernels {
    ($($(#[$doc:meta])* $variant:ident = $file:literal $name:literal [$($kind:expr),*] $($shared:ident)?;)*) => {
        /// A kernel of the table.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Kernel { $($(#[$doc])* $variant),* }

        /// Every kernel, in the order of [`Kernel`].
        pub const TABLE: &[Entry] = &[$({
            #[allow(unused_imports, reason = "not every row needs every name")]
            use Kind::{F32, Pointer as P, Struct, U32, U64};
            Entry { file: $file, name: $name, args: &[$($kind),*], shared: kernels!(@shared $($shared)?) }
        }),*];
    };
    (@shared shared) => { true };
    (@shared) => { false };
}

kernels! {
    /// Rows of a packed table.
    Embed = "rows" "embed" [P, P, U32, U32, U32, P, P];
    /// Residual sum.
    Add = "rows" "add" [P, P, U32, U64];
    /// Element types.
    Convert = "rows" "convert" [P, U32, U64, P, U32];
    /// Two rows side by side.
    Concat = "rows" "concat" [P, U32, P, U32, U32, P];
    /// Chosen rows of the residual stream.
    GatherRows = "rows" "gather_rows" [P, U32, P, P];
    /// Codes and scales to F32.
    DecodeCodes = "rows" "decode_codes" [P, P, U32, P];
    /// Weighted sum of expert rows.
    Combine = "rows" "combine" [P, U32, P, P, U32, P, U32, U32, P];
    /// RMSNorm.
    RmsNorm = "norm" "rms_norm" [P, U32, P, F32, U32, P, U32];
    /// The cached row.
    KvAppend = "norm" "kv_append" [P, U32, P, F32, U32, U32, P, P, P, P, U32];
    /// Rotation of queries.
    RopeQuery = "norm" "rope_query" [P, U32, U32, U32, U32, P, P];
    /// The published quantiser.
    Quantise = "activation" "quantise" [P, U32, U32, U32, P, P];
    /// silu(gate) * up.
    Swiglu = "activation" "swiglu" [P, U32, U32, U32, P, U32];
    /// Product with F32 weights.
    ProductF32 = "product" "product_f32" [P, U32, P, P, U32, P, P, P, P, U32, P, U32, U32, U32, U32, P, P, U32, U32];
    /// Product with BF16 weights.
    ProductBf16 = "product" "product_bf16" [P, U32, P, P, U32, P, P, P, P, U32, P, U32, U32, U32, U32, P, P, U32, U32];
    /// Product with e4m3 weights.
    ProductE4m3 = "product" "product_e4m3" [P, U32, P, P, U32, P, P, P, P, U32, P, U32, U32, U32, U32, P, P, U32, U32];
    /// Product of e4m3 codes with e4m3 weights.
    ProductE4m3Coded = "product" "product_e4m3_coded"
        [P, U32, P, P, U32, P, P, P, P, U32, P, U32, U32, U32, U32, P, P, U32, U32];
    /// Row-major to panels.
    Pack = "product" "pack" [P, U32, U32, U32, P];
    /// Cached rows to contiguous ones.
    KvRead = "kv" "kv_read" [P, U32, U32, U32, U32, P, P];
    /// Contiguous rows to cached ones.
    KvWrite = "kv" "kv_write" [P, U32, U32, U32, U32, P, P];
    /// Cached rows of a sequence to F32.
    KvGather = "kv" "kv_gather" [P, U32, U32, U32, U32, P, U32, P];
    /// Queries into the latent space.
    Absorb = "attention" "absorb" [P, U32, P, U32, U32, U32, U32, U32, P, U32, P, P];
    /// Absorbed attention.
    AttendLatent = "attention" "attend_latent"
        [P, U32, P, P, P, P, P, U32, U32, U32, U32, F32, P, U32, U32, P] shared;
    /// Naive attention.
    AttendExpanded = "attention" "attend_expanded"
        [P, U32, U32, U32, U32, U32, U32, U32, U32, U32, F32, P, P, U32, P] shared;
    /// Latent outputs to values.
    ValueUp = "attention" "value_up" [P, P, U32, U32, U32, U32, P, U32, P, P, U32];
    /// Packing of an e4m3 matrix into wgmma's tiles.
    PackFp8 = "pack" "pack_fp8" [P, U64, P, U32, U32];
    /// The same of BF16 matrices, also transposed.
    PackBf16 = "pack" "pack_bf16" [P, U64, U64, P, U64, U32, U32, U32, U32];
    /// Gate and up rows alternating.
    PackGateUpFp8 = "pack" "pack_gate_up_fp8" [P, P, P, U32, U32];
    /// The same of BF16.
    PackGateUpBf16 = "pack" "pack_gate_up_bf16" [P, P, P, U32, U32];
    /// kv_b to BF16.
    DequantFp8 = "pack" "dequant_fp8" [P, P, P, U32, U32];
    /// Scales of powers of two to F32.
    ScalesUe8m0 = "pack" "scales_ue8m0" [P, P, U32];
    /// Elements by position.
    Draw = "draw" "draw" [U64, U64, U64, F32, U32, P];
    /// The published quantiser on BF16 rows, for the products of tensor cores.
    QuantiseBf16 = "quantise" "quantise_bf16" [P, U64, P, P, P, U32, U32, U32];
    /// The same on F32 rows.
    QuantiseF32 = "quantise" "quantise_f32" [P, U64, P, P, P, U32, U32, U32];
    /// Tensor-core product, whole tiles, 8 rows.
    GemmFp8N8 = "gemm" "gemm_fp8_n8" [Struct(176)] shared;
    /// Tensor-core product, whole tiles, 16 rows.
    GemmFp8N16 = "gemm" "gemm_fp8_n16" [Struct(176)] shared;
    /// Tensor-core product, whole tiles, 32 rows.
    GemmFp8N32 = "gemm" "gemm_fp8_n32" [Struct(176)] shared;
    /// Tensor-core product, whole tiles, 64 rows.
    GemmFp8N64 = "gemm" "gemm_fp8_n64" [Struct(176)] shared;
    /// Tensor-core product, whole tiles, 128 rows.
    GemmFp8N128 = "gemm" "gemm_fp8_n128" [Struct(176)] shared;
    /// Tensor-core product, half tiles, 8 rows.
    GemmFp8H8 = "gemm" "gemm_fp8_h8" [Struct(176)] shared;
    /// Tensor-core product, half tiles, 16 rows.
    GemmFp8H16 = "gemm" "gemm_fp8_h16" [Struct(176)] shared;
    /// Tensor-core product, half tiles, 32 rows.
    GemmFp8H32 = "gemm" "gemm_fp8_h32" [Struct(176)] shared;
    /// Tensor-core product, half tiles, 64 rows.
    GemmFp8H64 = "gemm" "gemm_fp8_h64" [Struct(176)] shared;
    /// Tensor-core product, whole tiles, 8 rows.
    GemmBf16N8 = "gemm" "gemm_bf16_n8" [Struct(176)] shared;
    /// Tensor-core product, whole tiles, 16 rows.
    GemmBf16N16 = "gemm" "gemm_bf16_n16" [Struct(176)] shared;
    /// Tensor-core product, whole tiles, 32 rows.
    GemmBf16N32 = "gemm" "gemm_bf16_n32" [Struct(176)] shared;
    /// Tensor-core product, whole tiles, 64 rows.
    GemmBf16N64 = "gemm" "gemm_bf16_n64" [Struct(176)] shared;
    /// Tensor-core product, whole tiles, 128 rows.
    GemmBf16N128 = "gemm" "gemm_bf16_n128" [Struct(176)] shared;
    /// Tensor-core product, half tiles, 8 rows.
    GemmBf16H8 = "gemm" "gemm_bf16_h8" [Struct(176)] shared;
    /// Tensor-core product, half tiles, 16 rows.
    GemmBf16H16 = "gemm" "gemm_bf16_h16" [Struct(176)] shared;
    /// Tensor-core product, half tiles, 32 rows.
    GemmBf16H32 = "gemm" "gemm_bf16_h32" [Struct(176)] shared;
    /// Tensor-core product, half tiles, 64 rows.
    GemmBf16H64 = "gemm" "gemm_bf16_h64" [Struct(176)] shared;
    /// The whole expert block in one launch.
    ExpertBlock = "expert_block" "expert_block" [Struct(128)] shared;
    /// Cuts decode rows into pieces.
    MlaPlan = "mla_decode" "mla_plan" [P, U32, U32, P, P, P];
    /// Rotary queries into query tiles.
    MlaQueryRope = "mla_decode" "mla_query_rope" [P, U64, P, U32, U32, U32, U32, U32];
    /// Absorbed attention, 512 latent columns.
    MlaDecode512 = "mla_decode" "mla_decode_512" [Struct(120)] shared;
    /// Absorbed attention, 128 latent columns.
    MlaDecode128 = "mla_decode" "mla_decode_128" [Struct(120)] shared;
    /// Naive attention, 64 columns a head.
    MlaPrefill64 = "mla_prefill" "mla_prefill_64" [Struct(104)] shared;
    /// Naive attention, 128 columns a head.
    MlaPrefill128 = "mla_prefill" "mla_prefill_128" [Struct(104)] shared;
    /// The yardstick of `cadre bench kernels`.
    ReadAll = "measure" "read_all" [P, U64, P];
    /// What a greedy token needs.
    Largest = "sample" "largest" [P, U32, P, P];
    /// What a drawn token needs.
    Candidates = "candidates" "candidates_of" [P, U32, P, U32, P, P];
    /// The choice of experts.
    Choose = "gate" "choose" [P, P, U32, U32, U32, U32, U32, F32, U32, U32, P, P, P] shared;
}

impl Kernel {
    /// Its row of the table.
    pub fn entry(self) -> &'static Entry {
        &TABLE[self as usize]
    }
}

/// Every file of the table, once.
pub fn files() -> Vec<&'static str> {
    let mut files: Vec<_> = TABLE.iter().map(|entry| entry.file).collect();
    files.sort_unstable();
    files.dedup();
    files
}

/// Where the machine code is: the folder given, or `kernels/sm_90a` beside the executable or up to three folders
/// above it (where cargo's target folder is, for a test as for a binary).
pub fn folder(given: Option<&Path>) -> Result<PathBuf, CudaError> {
    let executable = std::env::current_exe().unwrap_or_default();
    let looked_in: Vec<PathBuf> = match given {
        Some(path) => vec![path.to_path_buf()],
        None => executable
            .ancestors()
            .skip(1)
            .take(4)
            .map(|folder| folder.join("kernels").join(ARCHITECTURE))
            .collect(),
    };
    let file = format!("{}.cubin", TABLE[0].file);
    match looked_in.iter().find(|folder| folder.join(&file).is_file()) {
        Some(folder) => Ok(folder.clone()),
        None => Err(CudaError::NoKernels { file, looked_in }),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    fn sources() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels")
    }

    /// `extern "C" __global__ ... name(arguments)` of a file: names and argument declarations.
    fn entry_points(text: &str) -> Vec<(String, Vec<String>)> {
        let mut found = Vec::new();
        let mut rest = text;
        while let Some(at) = rest.find("extern \"C\" __global__") {
            rest = &rest[at..];
            let mut head = &rest[..rest.find('{').unwrap()];
            if let Some(bounds) = head.find("__launch_bounds__") {
                head = &head[bounds + head[bounds..].find(')').unwrap() + 1..];
            }
            let open = head.find('(').unwrap();
            let name = head[..open].split_whitespace().last().unwrap().to_owned();
            let list = &head[open + 1..head.rfind(')').unwrap()];
            let args = list.split(',').map(|arg| arg.split_whitespace().collect::<Vec<_>>().join(" "));
            found.push((name, args.filter(|arg| !arg.is_empty()).collect()));
            rest = &rest[1..];
        }
        found
    }

    /// `text` holds the size of a structure in its static_assert.
    fn kind(text: &str, declaration: &str) -> Kind {
        let words: Vec<_> = declaration.split_whitespace().collect();
        if declaration.contains('*') {
            return Kind::Pointer;
        }
        match words[words.len() - 2] {
            "u32" | "int" => Kind::U32,
            "u64" | "i64" => Kind::U64,
            "float" => Kind::F32,
            other => {
                let (_, size) =
                    text.split_once(&format!("static_assert(sizeof({other}) == ")).unwrap_or_else(|| {
                        panic!("{declaration}: what is {other}?");
                    });
                Kind::Struct(size.split(',').next().unwrap().parse().unwrap())
            }
        }
    }

    #[test]
    fn the_table_is_what_the_sources_declare() {
        let mut declared = Vec::new();
        for file in files() {
            let text = std::fs::read_to_string(sources().join(format!("{file}.cu"))).unwrap();
            for (name, args) in entry_points(&text) {
                let kinds: Vec<_> = args.iter().map(|arg| kind(&text, arg)).collect();
                let entry = TABLE.iter().find(|entry| entry.file == file && entry.name == name);
                let entry = entry.unwrap_or_else(|| panic!("{name} of {file}.cu is not in the table"));
                assert_eq!(entry.args, kinds, "{file}.cu: {name}({})", args.join(", "));
                assert_eq!(entry.shared, uses_shared(&text, &name), "{file}.cu: shared memory of {name}");
                declared.push((file, name));
            }
        }
        for entry in TABLE {
            let there = declared.iter().any(|(file, name)| *file == entry.file && *name == entry.name);
            assert!(there, "{}.cu declares no {}", entry.file, entry.name);
        }
    }

    /// Whether the body of a kernel names `extern __shared__` memory.
    fn uses_shared(text: &str, name: &str) -> bool {
        let from = text.find(&format!(" {name}(")).unwrap();
        let end = text[from..].find("extern \"C\"").map_or(text.len(), |end| from + end);
        text[from..end].contains("extern __shared__")
    }

    #[test]
    fn every_source_is_in_the_table_and_no_header_but_ours_is_included() {
        for entry in std::fs::read_dir(sources()).unwrap() {
            let path = entry.unwrap().path();
            let text = std::fs::read_to_string(&path).unwrap();
            for line in text.lines().filter(|line| line.trim_start().starts_with("#include")) {
                let header = line.split('"').nth(1).unwrap_or_else(|| panic!("{}: {line}", path.display()));
                assert!(sources().join(header).is_file(), "{}: {line}", path.display());
            }
            let stem = path.file_stem().unwrap().to_str().unwrap();
            if path.extension().unwrap() == "cu" {
                assert!(files().contains(&stem), "{} has no row in the table", path.display());
            }
        }
    }

    #[test]
    fn missing_kernels_are_told_with_the_places() {
        let empty = tempfile::tempdir().unwrap();
        let error = folder(Some(empty.path())).unwrap_err();
        assert!(error.to_string().contains(&empty.path().display().to_string()), "{error}");
        std::fs::write(empty.path().join(format!("{}.cubin", TABLE[0].file)), "").unwrap();
        assert_eq!(folder(Some(empty.path())), Ok(empty.path().to_path_buf()));
    }
}
