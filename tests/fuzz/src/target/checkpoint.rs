//! The files of a checkpoint's folder, one of them changed: whatever it says, `inspect` and opening tell findings.
//! What opens without a finding gives every tensor's bytes.

use std::{fs, path::PathBuf, sync::Mutex};

use cadre_checkpoint::{
    CONFIG_FILE, Checkpoint, INDEX_FILE, SINGLE_FILE, WeightsOptions,
    inspect::{Layout, Options, inspect},
    synth::{self, SynthSpec, WeightFormat},
    table,
};
use tempfile::TempDir;

use crate::draw::Draw;

struct Folder {
    _folder: TempDir,
    dir: PathBuf,
    /// Name and bytes of what a checkpoint has.
    originals: Vec<(String, Vec<u8>)>,
}

/// Tiny, whole and right, in memory where the machine has such a folder.
fn folder() -> Folder {
    let shm = std::path::Path::new("/dev/shm");
    let base = if shm.is_dir() { shm.to_path_buf() } else { std::env::temp_dir() };
    let folder = tempfile::tempdir_in(base).expect("a folder");
    let dir = folder.path().join("tiny");
    synth::write(&dir, &SynthSpec::tiny(WeightFormat::Fp8, 1), &|_, _| {}).expect("a checkpoint");
    let mut originals: Vec<(String, Vec<u8>)> = fs::read_dir(&dir)
        .expect("the folder")
        .map(|entry| entry.expect("an entry").path())
        .map(|path| {
            (path.file_name().unwrap().to_string_lossy().into_owned(), fs::read(&path).expect("a file"))
        })
        .collect();
    originals.sort();
    Folder { _folder: folder, dir, originals }
}

pub(crate) fn run(bytes: &[u8]) {
    static FOLDER: Mutex<Option<Folder>> = Mutex::new(None);
    let mut guard = FOLDER.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let folder = guard.get_or_insert_with(folder);
    let mut draw = Draw::new(bytes);
    let name = draw.of(&[
        CONFIG_FILE,
        INDEX_FILE,
        "tokenizer_config.json",
        "generation_config.json",
        SINGLE_FILE,
        "shard",
    ]);
    let name = match name {
        "shard" => {
            let shard = folder.originals.iter().find(|(name, _)| name.ends_with(".safetensors"));
            shard.expect("a shard").0.clone()
        }
        name => name.to_owned(),
    };
    let original = folder.originals.iter().find(|(known, _)| *known == name).map(|(_, bytes)| bytes.clone());
    let changed = match (draw.of(&["all", "value", "part"]), &original) {
        ("value", Some(original)) => value(original, &mut draw),
        ("part", Some(original)) => part(original, &mut draw),
        _ => draw.rest().to_vec(),
    };
    let path = folder.dir.join(&name);
    fs::write(&path, changed).expect("write");
    let layout = Layout { shards: 2, redundant_slots: 0 };
    let options = Options { weights: WeightsOptions::default(), layout, hash: true, verify: None };
    let report = inspect(&folder.dir, &options, &|_, _| {});
    match Checkpoint::open(&folder.dir) {
        Ok(checkpoint) => {
            for tensor in table::table(checkpoint.config()) {
                checkpoint.tensor_bytes(&tensor.name).expect("a checkpoint that opens has every tensor");
            }
        }
        Err(_) => assert!(!report.problems.is_empty(), "what does not open has a finding"),
    }
    match original {
        Some(original) => fs::write(&path, original).expect("write"),
        None => fs::remove_file(&path).expect("remove"),
    }
}

/// A JSON file with one top-level value replaced.
fn value(original: &[u8], draw: &mut Draw<'_>) -> Vec<u8> {
    let Ok(serde_json::Value::Object(mut object)) = serde_json::from_slice(original) else {
        return part(original, draw);
    };
    let which = draw.below(object.len());
    if let Some(value) = object.values_mut().nth(which) {
        *value = match draw.below(8) {
            0 => serde_json::Value::Null,
            1 => draw.number().into(),
            2 => (draw.number() as i64).into(),
            3 => serde_json::json!(f64::from_bits(draw.number())),
            4 => serde_json::json!([draw.number()]),
            5 => serde_json::json!({}),
            6 => true.into(),
            _ => String::from_utf8_lossy(draw.bytes()).into(),
        };
    }
    serde_json::to_vec(&object).expect("JSON")
}

/// A file with some bytes replaced near its beginning, where headers are.
fn part(original: &[u8], draw: &mut Draw<'_>) -> Vec<u8> {
    let mut bytes = original.to_vec();
    while !draw.is_empty() && !bytes.is_empty() {
        let at = (draw.below(256) * 256 + draw.below(256)) % bytes.len();
        let new = draw.bytes();
        let end = (at + new.len()).min(bytes.len());
        if draw.one_in(8) {
            bytes.truncate(at);
        } else {
            bytes.splice(at..end, new.iter().copied());
        }
    }
    bytes
}
