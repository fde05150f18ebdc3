//! Damaged copies of the bundled checkpoint.

use std::{fs, os::unix::fs::FileExt, path::Path};

use serde_json::Value;
use tempfile::TempDir;

use crate::binary::pocket;

/// A copy that a test may damage.
pub fn copy() -> TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for entry in fs::read_dir(pocket()).expect("models/pocket") {
        let entry = entry.expect("an entry");
        fs::copy(entry.path(), folder.path().join(entry.file_name())).expect("copy a file");
    }
    folder
}

/// Rewrites a JSON file.
pub fn edit_json(folder: &Path, file: &str, edit: impl FnOnce(&mut Value)) {
    let path = folder.join(file);
    let mut value = serde_json::from_str(&fs::read_to_string(&path).expect(file)).expect(file);
    edit(&mut value);
    fs::write(&path, value.to_string()).expect(file);
}

/// Cuts the last bytes off a file.
pub fn truncate(folder: &Path, file: &str, bytes: u64) {
    let path = folder.join(file);
    let length = fs::metadata(&path).expect(file).len();
    let open = fs::OpenOptions::new().write(true).open(&path).expect(file);
    open.set_len(length - bytes).expect(file);
}

/// Changes the header of a safetensors file; the data keeps its offsets.
pub fn edit_header(folder: &Path, file: &str, edit: impl FnOnce(&mut Value)) {
    let path = folder.join(file);
    let bytes = fs::read(&path).expect(file);
    let (length, rest) = bytes.split_at(8);
    let length = u64::from_le_bytes(length.try_into().expect("eight bytes")) as usize;
    let (header, data) = rest.split_at(length);
    let mut value = serde_json::from_slice(header).expect("a header");
    edit(&mut value);
    let header = value.to_string();
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend_from_slice(header.as_bytes());
    out.extend_from_slice(data);
    fs::write(&path, out).expect(file);
}

/// Overwrites the first bytes of a tensor, wherever it lies, in place: processes that have mapped the file go on.
pub fn overwrite(folder: &Path, tensor: &str, bytes: &[u8]) {
    let index: Value = serde_json::from_str(
        &fs::read_to_string(folder.join("model.safetensors.index.json")).expect("the index"),
    )
    .expect("the index");
    let file = index["weight_map"][tensor].as_str().unwrap_or_else(|| panic!("no tensor {tensor}"));
    let path = folder.join(file);
    let content = fs::read(&path).expect(file);
    let header_bytes = u64::from_le_bytes(content[..8].try_into().expect("eight bytes")) as usize;
    let header: Value = serde_json::from_slice(&content[8..8 + header_bytes]).expect("a header");
    let offset = header[tensor]["data_offsets"][0].as_u64().expect("an offset") as usize;
    let at = 8 + header_bytes + offset;
    let open = fs::OpenOptions::new().write(true).open(&path).expect(file);
    open.write_all_at(bytes, at as u64).expect(file);
}
