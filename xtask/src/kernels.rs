//! `cargo xtask kernels`: every CUDA kernel to machine code, on a machine without a GPU.
//!
//! nvcc comes from the Python index and is kept under the user's cache; nothing of it enters the repository or the
//! binary. Each `crates/ops-cuda/kernels/*.cu` becomes `kernels/sm_90a/NAME.cubin` in the target folder, where
//! `cadre-ops-cuda` looks for it. A warning, a spilled register, a stack frame or local memory fails the gate: on the
//! paths that these kernels are for, each costs more than the kernel.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Mutex,
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use sha2::{Digest, Sha256};

use crate::{command, metadata::Metadata, tools};

/// The architecture that the kernels are written for; `cadre_ops_cuda` asks the device for it.
const ARCHITECTURE: &str = "sm_90a";

/// The compiler and what it reads. A 13.0 one: machine code of a newer compiler may not load with a 13.0 driver.
const WHEELS: [&str; 5] = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-cccl==13.0.85",
];

/// `-fmad=false`: a product and a sum are two roundings unless the source says fma (docs/numerics.md).
const FLAGS: [&str; 9] = [
    "-gencode=arch=compute_90a,code=sm_90a",
    "-cubin",
    "-O3",
    "-std=c++17",
    "-fmad=false",
    "-Werror",
    "all-warnings",
    "-Xptxas",
    "-v,-warn-spills,-warn-lmem-usage",
];

/// Compilers at a time.
const WORKERS: usize = 2;

/// Compiles what changed and judges everything.
pub(crate) fn run() -> Result<()> {
    let folder = compiled()?;
    println!("kernels: {}", folder.display());
    Ok(())
}

/// The kernels, then their test programs: `tests/gpu/kernels/*.cu` to `kernels/tests/NAME` in the target folder, with
/// the static runtime, so that they run from there or from a copy on any machine with a card and a driver.
pub(crate) fn run_with_tests() -> Result<()> {
    run()?;
    let nvcc = nvcc()?;
    let libraries = nvcc.parent().and_then(Path::parent).context("nvcc lies in no folder")?.join("lib");
    let out = Metadata::load()?.target_directory.join("kernels/tests");
    fs::create_dir_all(&out).with_context(|| format!("create {}", out.display()))?;
    for source in sources(&command::root()?.join("tests/gpu/kernels"))? {
        let program = out.join(&source.name);
        let mut nvcc = Command::new(&nvcc);
        nvcc.args(FLAGS.iter().take(1)).args(["-O3", "-std=c++17", "-fmad=false", "-lcudart_static"]);
        nvcc.arg("-L").arg(&libraries).arg("-o").arg(&program).arg(&source.path);
        let shown = command::show(&nvcc);
        let output = nvcc.output().with_context(|| format!("start `{shown}`"))?;
        if !output.status.success() {
            bail!("`{shown}` ended with {}:\n{}", output.status, String::from_utf8_lossy(&output.stderr));
        }
        println!("{}", program.display());
    }
    Ok(())
}

/// The folder of the machine code, up to date.
pub(crate) fn compiled() -> Result<PathBuf> {
    let nvcc = nvcc()?;
    let out = Metadata::load()?.target_directory.join("kernels").join(ARCHITECTURE);
    fs::create_dir_all(&out).with_context(|| format!("create {}", out.display()))?;
    let sources = sources(&command::root()?.join("crates/ops-cuda/kernels"))?;
    ensure!(!sources.is_empty(), "crates/ops-cuda/kernels has no .cu file");
    let queue = Mutex::new(sources.iter());
    let reports = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                // A poisoned lock means that a worker panicked; the scope will say so.
                while let Some(source) = queue.lock().ok().and_then(|mut queue| queue.next()) {
                    let report = compile(&nvcc, source, &out);
                    if let Ok(mut reports) = reports.lock() {
                        reports.push((source.name.as_str(), report));
                    }
                }
            });
        }
    });
    let mut reports = reports.into_inner().map_err(|_| anyhow!("a compiler's thread panicked"))?;
    reports.sort_by_key(|(name, _)| *name);
    remove_strangers(&out, &sources)?;
    let mut faults = Vec::new();
    println!("{:<14} {:<28} {:>9} {:>13}", "file", "kernel", "registers", "shared bytes");
    for (file, report) in &reports {
        match report {
            Err(error) => faults.push(format!("{file}.cu: {error:#}")),
            Ok(usages) => {
                for usage in usages {
                    println!("{file:<14} {:<28} {:>9} {:>13}", usage.kernel, usage.registers, usage.shared);
                    faults.extend(usage.fault().map(|fault| format!("{file}.cu: {}: {fault}", usage.kernel)));
                }
            }
        }
    }
    faults.iter().for_each(|fault| eprintln!("kernels: {fault}"));
    ensure!(faults.is_empty(), "{} kernels are not fit for use", faults.len());
    Ok(out)
}

/// One file and what its machine code depends on.
struct Source {
    name: String,
    path: PathBuf,
    /// Of the file, every file that it could include, the compiler and its flags.
    hash: String,
}

fn sources(folder: &Path) -> Result<Vec<Source>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))? {
        paths.push(entry?.path());
    }
    paths.sort();
    let has = |path: &PathBuf, extension: &str| path.extension().is_some_and(|found| found == extension);
    let mut shared = Sha256::new();
    shared.update(WHEELS.join(" "));
    shared.update(FLAGS.join(" "));
    for header in paths.iter().filter(|path| has(path, "cuh")) {
        shared.update(fs::read(header).with_context(|| format!("read {}", header.display()))?);
    }
    paths
        .iter()
        .filter(|path| has(path, "cu"))
        .map(|path| {
            let mut hash = shared.clone();
            hash.update(fs::read(path).with_context(|| format!("read {}", path.display()))?);
            let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            let hash = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
            Ok(Source { name, path: path.clone(), hash })
        })
        .collect()
}

/// What the assembler says of one kernel.
#[derive(Debug, PartialEq, Eq)]
struct Usage {
    kernel: String,
    registers: u32,
    shared: u32,
    stack: u32,
    spilled: u32,
}

impl Usage {
    fn fault(&self) -> Option<String> {
        (self.stack > 0 || self.spilled > 0)
            .then(|| format!("{} bytes of stack frame, {} bytes spilled", self.stack, self.spilled))
    }
}

/// Compiles a file unless its machine code and the assembler's words are there and fresh.
fn compile(nvcc: &Path, source: &Source, out: &Path) -> Result<Vec<Usage>> {
    let (cubin, log) = (out.join(format!("{}.cubin", source.name)), out.join(format!("{}.log", source.name)));
    if cubin.is_file()
        && let Ok(text) = fs::read_to_string(&log)
        && let Some(words) = text.strip_prefix(&source.hash)
    {
        return usages(words);
    }
    let scratch = out.join(format!("{}.cubin.new", source.name));
    let mut nvcc = Command::new(nvcc);
    nvcc.args(FLAGS).arg("-o").arg(&scratch).arg(&source.path);
    let shown = command::show(&nvcc);
    let output = nvcc.output().with_context(|| format!("start `{shown}`"))?;
    let words = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        bail!("`{shown}` ended with {}:\n{words}", output.status);
    }
    let usages = usages(&words)?;
    // The log last: it is what says that the machine code belongs to the source.
    fs::rename(&scratch, &cubin).with_context(|| format!("rename to {}", cubin.display()))?;
    fs::write(&log, format!("{}\n{words}", source.hash))
        .with_context(|| format!("write {}", log.display()))?;
    Ok(usages)
}

/// Machine code of files that are gone would be shipped.
fn remove_strangers(out: &Path, sources: &[Source]) -> Result<()> {
    for entry in fs::read_dir(out).with_context(|| format!("read {}", out.display()))? {
        let path = entry?.path();
        let stem = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let stem = stem.split('.').next().unwrap_or_default();
        if !sources.iter().any(|source| source.name == stem) {
            fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))?;
        }
    }
    Ok(())
}

/// Reads the assembler's words (`-v`): per kernel a line that names it, one with its stack, one with its registers.
fn usages(words: &str) -> Result<Vec<Usage>> {
    let mut usages: Vec<Usage> = Vec::new();
    for line in words.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let kernel = rest.split('\'').next().unwrap_or_default().to_owned();
            usages.push(Usage { kernel, registers: 0, shared: 0, stack: 0, spilled: 0 });
            continue;
        }
        let Some(usage) = usages.last_mut() else { continue };
        if line.contains("bytes stack frame") {
            usage.stack += number(line, " bytes stack frame").unwrap_or(0);
            usage.spilled += number(line, " bytes spill stores").unwrap_or(0);
            usage.spilled += number(line, " bytes spill loads").unwrap_or(0);
        } else if line.contains(" registers") {
            usage.registers = number(line, " registers").context("no number of registers")?;
            usage.shared = number(line, " bytes smem").unwrap_or(0);
        }
    }
    let silent = usages.iter().find(|usage| usage.registers == 0);
    if let Some(usage) = silent {
        bail!("the assembler says nothing of the registers of {}", usage.kernel);
    }
    ensure!(!usages.is_empty(), "no entry point");
    Ok(usages)
}

/// The number that stands right before `unit`.
fn number(line: &str, unit: &str) -> Option<u32> {
    let (before, _) = line.split_once(unit)?;
    let digits = before.rsplit(|c: char| !c.is_ascii_digit()).next()?;
    digits.parse().ok()
}

/// The compiler, fetched on first use (300 MB).
fn nvcc() -> Result<PathBuf> {
    let mut hash = Sha256::new();
    hash.update(WHEELS.join(" "));
    let hash: String = hash.finalize().iter().take(6).map(|byte| format!("{byte:02x}")).collect();
    let tools = tools::cache()?.join("tools");
    let root = tools.join(format!("nvcc-{hash}"));
    let nvcc = root.join("nvidia/cu13/bin/nvcc");
    if nvcc.is_file() {
        return Ok(nvcc);
    }
    println!("fetching nvcc 13.0 into {} (once, 100 MB)", root.display());
    // A folder of our own each time: two runs at once do not meet, and half a fetch is never found again.
    let scratch = tools.join(format!("nvcc-{hash}.{}", std::process::id()));
    let fetched = fetch(&scratch).and_then(|()| {
        let site = scratch.join("site");
        ensure!(site.join("nvidia/cu13/bin/nvcc").is_file(), "the wheels left no nvcc in {}", site.display());
        match fs::rename(&site, &root) {
            Err(_) if nvcc.is_file() => Ok(()), // another run was first
            outcome => outcome.with_context(|| format!("rename to {}", root.display())),
        }
    });
    let removed = fs::remove_dir_all(&scratch).with_context(|| format!("remove {}", scratch.display()));
    fetched?;
    removed?;
    Ok(nvcc)
}

fn fetch(scratch: &Path) -> Result<()> {
    fs::create_dir_all(scratch).with_context(|| format!("create {}", scratch.display()))?;
    let venv = scratch.join("venv");
    command::run(Command::new("python3").args(["-m", "venv"]).arg(&venv))
        .context("python3 with its module venv is needed to fetch nvcc")?;
    command::run(
        Command::new(venv.join("bin/python"))
            .args(["-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:"])
            .args(["--no-compile", "--disable-pip-version-check", "--target"])
            .arg(scratch.join("site"))
            .args(WHEELS),
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    const WORDS: &str = "ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'add' for 'sm_90a'
ptxas info    : Function properties for add
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 14 registers, used 0 barriers
ptxas info    : Compile time = 2.855 ms
ptxas info    : Compiling entry function 'product_bf16' for 'sm_90a'
ptxas info    : Function properties for product_bf16
    16 bytes stack frame, 20 bytes spill stores, 28 bytes spill loads
ptxas info    : Used 56 registers, used 1 barriers, 16 bytes cumulative stack size, 4096 bytes smem
";

    #[test]
    fn what_the_assembler_says_is_read_per_kernel() {
        let usages = usages(WORDS).unwrap();
        let names: Vec<_> = usages.iter().map(|usage| (usage.kernel.as_str(), usage.registers)).collect();
        assert_eq!(names, [("add", 14), ("product_bf16", 56)]);
        assert_eq!((usages[1].shared, usages[0].shared), (4096, 0));
        assert_eq!(usages[0].fault(), None);
        assert_eq!(usages[1].fault().unwrap(), "16 bytes of stack frame, 48 bytes spilled");
    }

    #[test]
    fn silence_is_no_approval() {
        assert!(usages("").is_err());
        assert!(usages("ptxas info    : Compiling entry function 'add' for 'sm_90a'\n").is_err());
    }

    #[test]
    fn a_changed_header_makes_every_file_stale() {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in [("a.cu", "one"), ("b.cu", "two"), ("shared.cuh", "three"), ("notes.txt", "four")]
        {
            fs::write(folder.path().join(name), text).unwrap();
        }
        let before = sources(folder.path()).unwrap();
        assert_eq!(before.iter().map(|source| source.name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
        fs::write(folder.path().join("notes.txt"), "five").unwrap();
        let after = sources(folder.path()).unwrap();
        assert!(before.iter().zip(&after).all(|(a, b)| a.hash == b.hash));
        fs::write(folder.path().join("shared.cuh"), "six").unwrap();
        let after = sources(folder.path()).unwrap();
        assert!(before.iter().zip(&after).all(|(a, b)| a.hash != b.hash));
    }
}
