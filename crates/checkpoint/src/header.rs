//! The header of a safetensors file, read strictly.
//!
//! Layout: 8 bytes little-endian header length, that many bytes of JSON (`name -> dtype, shape,
//! data_offsets`), then the data. We ask for everything the format promises (offsets that cover the
//! data without a gap or an overlap, lengths that follow from shape and dtype) because whoever slices
//! the mapping afterwards must not have to think about it: a parsed tensor's `range` lies inside the
//! file and has exactly the bytes of its shape.

use std::{fmt, ops::Range};

use serde::{
    Deserialize, Deserializer, Serialize,
    de::{IgnoredAny, MapAccess, Visitor},
};
use serde_json::Value;

use crate::problem::{About, Problem, ProblemKind, quote};

/// Longest header accepted, as in the reference implementation of the format.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Most tensors of one file. V3 has 92 thousand and Kimi K2 140 thousand in all their files together. An
/// empty tensor costs a file nothing but 60 bytes of header, of which 1.5 million fit into the longest one.
pub(crate) const MAX_TENSORS: usize = 1 << 18;
/// The length field before the header.
pub(crate) const LENGTH_BYTES: usize = 8;

/// Element types of the format that have whole bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[allow(missing_docs, reason = "each variant is its own name")]
pub enum Dtype {
    Bool,
    U8,
    I8,
    E5m2,
    E4m3,
    E8m0,
    I16,
    U16,
    F16,
    Bf16,
    I32,
    U32,
    F32,
    I64,
    U64,
    F64,
}

impl Dtype {
    const NAMES: [(Self, &'static str, usize); 16] = [
        (Self::Bool, "BOOL", 1),
        (Self::U8, "U8", 1),
        (Self::I8, "I8", 1),
        (Self::E5m2, "F8_E5M2", 1),
        (Self::E4m3, "F8_E4M3", 1),
        (Self::E8m0, "F8_E8M0", 1),
        (Self::I16, "I16", 2),
        (Self::U16, "U16", 2),
        (Self::F16, "F16", 2),
        (Self::Bf16, "BF16", 2),
        (Self::I32, "I32", 4),
        (Self::U32, "U32", 4),
        (Self::F32, "F32", 4),
        (Self::I64, "I64", 8),
        (Self::U64, "U64", 8),
        (Self::F64, "F64", 8),
    ];

    fn parse(name: &str) -> Option<Self> {
        Self::NAMES.into_iter().find(|entry| entry.1 == name).map(|entry| entry.0)
    }

    /// The name in a header.
    pub fn name(self) -> &'static str {
        Self::NAMES[self as usize].1
    }

    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        Self::NAMES[self as usize].2
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeaderEntry {
    /// Its name.
    pub name: String,
    /// Its element type.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its bytes, counted from the start of the file.
    pub range: Range<usize>,
}

/// A parsed header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Tensors by ascending offset.
    pub entries: Vec<HeaderEntry>,
    /// First byte of data, counted from the start of the file.
    pub data_start: usize,
    /// Length that the file must have.
    pub file_len: usize,
}

/// Parses the header at the start of `bytes`, a whole file or its beginning. The file's length is not
/// judged here (see [`Header::check_len`]), so that a file cut short still says what it should hold.
pub(crate) fn parse(about: &About, bytes: &[u8]) -> Result<Header, Box<Problem>> {
    let json = json_bytes(about, bytes)?;
    let data_start = LENGTH_BYTES + json.len();
    let mut entries = read_entries(about, json, data_start)?;
    entries.sort_by(|a, b| (a.range.start, a.range.end, &a.name).cmp(&(b.range.start, b.range.end, &b.name)));
    check_names(about, &entries)?;
    let file_len = check_coverage(about, &entries, data_start)?;
    Ok(Header { entries, data_start, file_len })
}

const FETCH_AGAIN: &str = "fetch or write this file again";

impl Header {
    /// Compares the file's length with what the header announces.
    pub(crate) fn check_len(&self, about: &About, len: usize) -> Result<(), Box<Problem>> {
        let (kind, fix) = match len.cmp(&self.file_len) {
            std::cmp::Ordering::Equal => return Ok(()),
            std::cmp::Ordering::Less => (ProblemKind::Truncated, "the file is truncated: fetch it again"),
            std::cmp::Ordering::Greater => (ProblemKind::TrailingBytes, FETCH_AGAIN),
        };
        // The first tensor that is not whole, which tells how far a download came.
        let subject = self.entries.iter().find(|entry| entry.range.end > len);
        let expected = format!("{} bytes", self.file_len);
        let found = format!("{len} bytes");
        Err(match subject {
            Some(entry) => about.tensor(kind, &entry.name, expected, found, fix),
            None => about.file(kind, expected, found, fix),
        })
    }
}

fn json_bytes<'a>(about: &About, bytes: &'a [u8]) -> Result<&'a [u8], Box<Problem>> {
    let Some((length, rest)) = bytes.split_first_chunk::<LENGTH_BYTES>() else {
        return Err(about.file(
            ProblemKind::Truncated,
            "at least 8 bytes",
            format!("{} bytes", bytes.len()),
            FETCH_AGAIN,
        ));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER_BYTES {
        return Err(about.file(
            ProblemKind::Malformed,
            format!("a header of at most {MAX_HEADER_BYTES} bytes"),
            format!("a header length of {length}"),
            "this is no safetensors file, or its first bytes are damaged: fetch it again",
        ));
    }
    let json = usize::try_from(length).ok().and_then(|length| rest.get(..length));
    let json = json.ok_or_else(|| {
        about.file(
            ProblemKind::Truncated,
            format!("a header of {length} bytes"),
            format!("a file of {} bytes", bytes.len()),
            "the file is truncated: fetch it again",
        )
    })?;
    if json.first() != Some(&b'{') {
        return Err(about.file(
            ProblemKind::Malformed,
            "a header that starts with `{`",
            format!("{:?}", quote(&String::from_utf8_lossy(&json[..json.len().min(16)]))),
            FETCH_AGAIN,
        ));
    }
    Ok(json)
}

fn entry(about: &About, name: String, value: &Value, data_start: usize) -> Result<HeaderEntry, Box<Problem>> {
    let malformed = |expected: &str| {
        about.tensor(ProblemKind::Malformed, &name, expected, quote(&value.to_string()), FETCH_AGAIN)
    };
    let dtype_name = value.get("dtype").and_then(Value::as_str);
    let dtype = dtype_name
        .and_then(Dtype::parse)
        .ok_or_else(|| malformed("a dtype of whole bytes that safetensors knows"))?;
    let shape: Vec<usize> =
        integers(value.get("shape")).ok_or_else(|| malformed("a shape (a list of non-negative integers)"))?;
    let offsets: Vec<usize> = integers(value.get("data_offsets"))
        .ok_or_else(|| malformed("data_offsets (two non-negative integers)"))?;
    let &[begin, end] = offsets.as_slice() else {
        return Err(malformed("data_offsets (two non-negative integers)"));
    };
    let bytes = shape.iter().try_fold(dtype.bytes(), |product, &dim| product.checked_mul(dim));
    if bytes.is_none() || end.checked_sub(begin) != bytes {
        return Err(malformed("data_offsets that span exactly the bytes of shape and dtype"));
    }
    let shift =
        |offset: usize| offset.checked_add(data_start).ok_or_else(|| malformed("offsets inside the file"));
    let range = shift(begin)?..shift(end)?;
    Ok(HeaderEntry { name, dtype, shape, range })
}

fn integers(value: Option<&Value>) -> Option<Vec<usize>> {
    let to_usize = |value: &Value| value.as_u64().and_then(|value| usize::try_from(value).ok());
    value?.as_array()?.iter().map(to_usize).collect()
}

/// Checks that the sorted entries follow each other without gap or overlap; returns where they end.
fn check_coverage(about: &About, entries: &[HeaderEntry], data_start: usize) -> Result<usize, Box<Problem>> {
    let mut cursor = data_start;
    for entry in entries {
        if entry.range.start != cursor {
            let what = if entry.range.start < cursor { "an overlap" } else { "a gap" };
            return Err(about.tensor(
                ProblemKind::Malformed,
                &entry.name,
                format!("data from byte {} on, where the one before it ends", cursor - data_start),
                format!("{what}: it begins at byte {}", entry.range.start - data_start),
                FETCH_AGAIN,
            ));
        }
        cursor = entry.range.end;
    }
    Ok(cursor)
}

/// Refuses names given twice: for most readers of JSON the later one replaces the earlier.
fn check_names(about: &About, entries: &[HeaderEntry]) -> Result<(), Box<Problem>> {
    let mut names: Vec<&str> = entries.iter().map(|entry| entry.name.as_str()).collect();
    names.sort_unstable();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        None => Ok(()),
        Some(pair) => {
            let found = format!("`{}` is given twice", quote(pair[0]));
            Err(about.file(ProblemKind::Malformed, "names that differ", found, FETCH_AGAIN))
        }
    }
}

/// The tensors in the order of the header. Each is judged as soon as it is parsed, so that what a header
/// costs before it is refused is bounded by [`MAX_TENSORS`] of our own entries.
fn read_entries(about: &About, json: &[u8], data_start: usize) -> Result<Vec<HeaderEntry>, Box<Problem>> {
    let mut reader = Entries { about, data_start, read: Vec::new(), problem: None };
    let mut json = serde_json::Deserializer::from_slice(json);
    let parsed = json.deserialize_map(&mut reader).and_then(|()| json.end());
    match (reader.problem, parsed) {
        (Some(problem), _) => Err(problem),
        (None, Ok(())) => Ok(reader.read),
        (None, Err(error)) => {
            let expected = "a safetensors header (one JSON object)";
            Err(about.file(ProblemKind::Malformed, expected, error.to_string(), FETCH_AGAIN))
        }
    }
}

struct Entries<'a> {
    about: &'a About,
    data_start: usize,
    read: Vec<HeaderEntry>,
    /// Why reading ended, if it was not the JSON.
    problem: Option<Box<Problem>>,
}

impl Entries<'_> {
    fn push(&mut self, name: String, value: &Value) -> Result<(), Box<Problem>> {
        if self.read.len() == MAX_TENSORS {
            let expected = format!("at most {MAX_TENSORS} tensors in one file");
            let fix = "split the checkpoint into more files, or fetch it as published";
            return Err(self.about.file(ProblemKind::Malformed, expected, "more", fix));
        }
        self.read.push(entry(self.about, name, value, self.data_start)?);
        Ok(())
    }
}

impl<'de> Visitor<'de> for &mut Entries<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            let value: Value = map.next_value()?;
            if let Err(problem) = self.push(name, &value) {
                self.problem = Some(problem);
                return Err(serde::de::Error::custom("a tensor is wrong"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
