//! A small checkpoint in a temporary directory, and ways to damage it.

use std::{
    fs,
    path::{Path, PathBuf},
};

use cadre_checkpoint::{
    Checkpoint, CheckpointError, Problem, Problems,
    synth::{self, SynthSpec, WeightFormat},
};
use serde_json::{Map, Value};

pub(crate) fn pocket() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/pocket")
}

/// The `tiny` preset cut down: one dense layer, one MoE layer, one MTP layer, eight experts.
pub(crate) fn small_spec(format: WeightFormat) -> SynthSpec {
    let mut spec = SynthSpec::tiny(format, 5);
    spec.config.vocab_size = 256;
    spec.config.num_hidden_layers = 2;
    spec.config.n_routed_experts = 8;
    spec.max_shard_bytes = 1 << 20;
    spec
}

pub(crate) struct Fixture {
    dir: tempfile::TempDir,
}

impl Fixture {
    pub(crate) fn new(format: WeightFormat) -> Self {
        Self::of(&small_spec(format))
    }

    pub(crate) fn of(spec: &SynthSpec) -> Self {
        let dir = tempfile::tempdir().unwrap();
        synth::write(dir.path(), spec, &|_, _| {}).unwrap();
        Self { dir }
    }

    /// Headers over holes.
    pub(crate) fn headers(spec: &SynthSpec) -> Self {
        let dir = tempfile::tempdir().unwrap();
        synth::write_headers(dir.path(), spec).unwrap();
        Self { dir }
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    pub(crate) fn open(&self) -> Checkpoint {
        Checkpoint::open(self.path()).expect("a good checkpoint")
    }

    /// What opening finds wrong.
    pub(crate) fn problems(&self) -> Problems {
        match Checkpoint::open(self.path()) {
            Ok(_) => panic!("the checkpoint opened"),
            Err(CheckpointError::Invalid { dir, problems }) => {
                assert_eq!(dir, self.path());
                assert!(!problems.is_empty());
                problems
            }
            Err(other) => panic!("another error: {other}"),
        }
    }

    /// The only thing that opening finds wrong.
    pub(crate) fn problem(&self) -> Problem {
        let problems = self.problems();
        assert_eq!(problems.total(), 1, "{problems}");
        problems.iter().next().unwrap().clone()
    }

    pub(crate) fn edit_json(&self, name: &str, edit: impl FnOnce(&mut Map<String, Value>)) {
        let path = self.file(name);
        let mut value: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        edit(value.as_object_mut().unwrap());
        fs::write(path, value.to_string()).unwrap();
    }

    pub(crate) fn edit_config(&self, edit: impl FnOnce(&mut Map<String, Value>)) {
        self.edit_json("config.json", edit);
    }

    pub(crate) fn edit_index(&self, edit: impl FnOnce(&mut Map<String, Value>)) {
        self.edit_json("model.safetensors.index.json", |index| {
            edit(index["weight_map"].as_object_mut().unwrap());
        });
    }

    /// The file that holds a tensor.
    pub(crate) fn shard_of(&self, tensor: &str) -> PathBuf {
        let index = fs::read(self.file("model.safetensors.index.json")).unwrap();
        let index: Value = serde_json::from_slice(&index).unwrap();
        self.file(index["weight_map"][tensor].as_str().expect(tensor))
    }

    /// Rewrites the shard that holds a tensor: its header and its data.
    pub(crate) fn edit_shard(
        &self,
        tensor: &str,
        edit: impl FnOnce(&mut Map<String, Value>, &mut Vec<u8>),
    ) -> PathBuf {
        let path = self.shard_of(tensor);
        let bytes = fs::read(&path).unwrap();
        let header_end = 8 + u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
        let mut header: Value = serde_json::from_slice(&bytes[8..header_end]).unwrap();
        let mut data = bytes[header_end..].to_vec();
        edit(header.as_object_mut().unwrap(), &mut data);
        let header = header.to_string();
        let mut out = (header.len() as u64).to_le_bytes().to_vec();
        out.extend(header.into_bytes());
        out.extend(data);
        fs::write(&path, out).unwrap();
        path
    }

    /// Overwrites bytes of a tensor, `at` bytes into it.
    pub(crate) fn poke(&self, tensor: &str, at: usize, bytes: &[u8]) -> PathBuf {
        self.edit_shard(tensor, |header, data| {
            let start = header[tensor]["data_offsets"][0].as_u64().unwrap() as usize + at;
            data[start..start + bytes.len()].copy_from_slice(bytes);
        })
    }
}

/// Resident bytes of this process's mappings of a file, from the kernel's account.
pub(crate) fn resident_bytes(path: &Path) -> usize {
    let smaps = fs::read_to_string("/proc/self/smaps").expect("Linux has smaps");
    let name = path.to_str().unwrap();
    let mut inside = false;
    let mut total = 0;
    for line in smaps.lines() {
        if line.ends_with(name) {
            inside = true;
        } else if inside && let Some(rest) = line.strip_prefix("Rss:") {
            total += rest.trim().trim_end_matches(" kB").parse::<usize>().unwrap() * 1024;
            inside = false;
        }
    }
    total
}
