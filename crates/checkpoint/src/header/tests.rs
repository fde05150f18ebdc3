//! The header parser against hand-made files, damaged files and the reference implementation.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;

use proptest::prelude::*;
use safetensors::SafeTensors;
use serde_json::{Value, json};

use super::{Dtype, Header, LENGTH_BYTES, MAX_TENSORS, parse};
use crate::problem::{About, Problem, ProblemKind};

const FILE: &str = "model-00001-of-000001.safetensors";

fn file(header: &str, data_bytes: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data_bytes, 7);
    bytes
}

fn read(bytes: &[u8]) -> Result<Header, Box<Problem>> {
    let about = About::new(Path::new(FILE));
    let header = parse(&about, bytes)?;
    header.check_len(&about, bytes.len())?;
    Ok(header)
}

fn sample() -> Value {
    json!({
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "F8_E4M3", "shape": [5], "data_offsets": [26, 31]},
        "c": {"dtype": "BF16", "shape": [], "data_offsets": [24, 26]},
        "empty": {"dtype": "BF16", "shape": [0, 9], "data_offsets": [26, 26]},
    })
}

#[test]
fn dtypes_are_listed_in_the_order_of_the_enum() {
    for (at, (dtype, name, bytes)) in Dtype::NAMES.into_iter().enumerate() {
        assert_eq!(dtype as usize, at);
        assert_eq!((dtype.name(), dtype.bytes(), Dtype::parse(name)), (name, bytes, Some(dtype)));
    }
}

#[test]
fn a_good_header_gives_ranges_in_the_file() {
    let text = sample().to_string();
    let bytes = file(&text, 31);
    let header = read(&bytes).unwrap();
    assert_eq!(header.data_start, LENGTH_BYTES + text.len());
    assert_eq!(header.file_len, bytes.len());
    let start = header.data_start;
    let names: Vec<_> =
        header.entries.iter().map(|e| (e.name.as_str(), e.range.start - start, e.range.len())).collect();
    assert_eq!(names, [("a", 0, 24), ("c", 24, 2), ("empty", 26, 0), ("b", 26, 5)]);
    assert_eq!(header.entries[0].shape, [2, 3]);
    SafeTensors::deserialize(&bytes).expect("the reference reads it too");
}

#[test]
fn what_is_wrong_with_a_tensor_names_it() {
    let cases = [
        ("dtype", json!("F7"), "dtype"),
        ("dtype", json!(3), "dtype"),
        ("shape", json!([2, -3]), "shape"),
        ("shape", json!("2x3"), "shape"),
        ("shape", json!([2, 4]), "data_offsets"),
        ("shape", json!([u64::MAX, u64::MAX]), "data_offsets"),
        ("data_offsets", json!([0]), "data_offsets"),
        ("data_offsets", json!([24, 0]), "data_offsets"),
        ("data_offsets", json!([0, 24, 30]), "data_offsets"),
        ("data_offsets", json!([u64::MAX - 24, u64::MAX]), "inside"),
        ("data_offsets", json!([2, 26]), "data from byte"),
    ];
    for (field, value, named) in cases {
        let mut header = sample();
        header["a"][field] = value;
        let problem = read(&file(&header.to_string(), 31)).unwrap_err();
        assert_eq!(problem.kind, ProblemKind::Malformed, "{problem}");
        assert!(problem.file == FILE && problem.to_string().contains('`'), "{problem}");
        assert!(problem.expected.contains(named), "{field}: {problem}");
    }
    let mut header = sample();
    header["b"]["data_offsets"] = json!([27, 32]);
    let problem = read(&file(&header.to_string(), 32)).unwrap_err();
    assert!(problem.found.contains("a gap") && problem.subject.contains("`b`"), "{problem}");
    header["b"]["data_offsets"] = json!([24, 29]);
    let problem = read(&file(&header.to_string(), 32)).unwrap_err();
    assert!(problem.found.contains("an overlap"), "{problem}");
}

#[test]
fn what_is_wrong_with_the_file_names_it() {
    let good = file(&sample().to_string(), 31);
    let cut = read(&good[..good.len() - 1]).unwrap_err();
    assert_eq!(cut.kind, ProblemKind::Truncated);
    assert!(cut.subject.contains("`b`") && cut.fix.contains("truncated"), "{cut}");
    let mut longer = good.clone();
    longer.push(0);
    assert_eq!(read(&longer).unwrap_err().kind, ProblemKind::TrailingBytes);
    for length in [0, 7, 8, 20] {
        assert_eq!(read(&good[..length]).unwrap_err().kind, ProblemKind::Truncated, "{length}");
    }
    let mut huge = good.clone();
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    assert_eq!(read(&huge).unwrap_err().kind, ProblemKind::Malformed);
    for text in ["", "[]", " {}", "{", "{\"a\": 1}", "{\"a\":{\"dtype\":\"F32\"}}"] {
        assert_eq!(read(&file(text, 0)).unwrap_err().kind, ProblemKind::Malformed, "{text}");
    }
    let entry = r#"{"dtype":"U8","shape":[1],"data_offsets":[0,1]}"#;
    let twice = format!(r#"{{"a":{entry},"a":{entry}}}"#);
    let problem = read(&file(&twice, 1)).unwrap_err();
    assert!(problem.found.contains("`a` is given twice"), "{problem}");
}

#[test]
fn the_number_of_tensors_is_bounded_while_they_are_read() {
    let header = |count: usize, end: &str| {
        let tensor = |at| format!(r#""t{at}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#);
        let tensors: Vec<String> = (0..count).map(tensor).collect();
        format!("{{{}{end}", tensors.join(","))
    };
    assert_eq!(read(&file(&header(MAX_TENSORS, "}"), 0)).unwrap().entries.len(), MAX_TENSORS);
    // What follows the first one too many is not even parsed.
    let problem = read(&file(&header(MAX_TENSORS + 1, ", and no JSON"), 0)).unwrap_err();
    assert!(problem.expected.contains("at most 262144 tensors"), "{problem}");
}

proptest! {
    /// Whatever the damage: an answer; what is accepted lies in the file, and the reference agrees.
    #[test]
    fn damage_is_answered(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut bytes = file(&sample().to_string(), 31);
        for (at, byte) in edits {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len() + 1));
        }
        if let Ok(header) = read(&bytes) {
            for entry in &header.entries {
                let elements: usize = entry.shape.iter().product();
                prop_assert_eq!(bytes[entry.range.clone()].len(), elements * entry.dtype.bytes());
            }
            // `__metadata__` is the one thing where we are more lenient: nothing in it is used.
            if bytes.windows(30).any(|window| window == br#""__metadata__":{"format":"pt"}"#) {
                prop_assert!(SafeTensors::deserialize(&bytes).is_ok());
            }
        }
    }

    #[test]
    fn any_bytes_are_answered(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = read(&bytes);
    }
}
