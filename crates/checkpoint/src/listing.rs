//! What the files of a checkpoint directory say they hold: the index and every shard's header.
//!
//! Reads headers through the mappings and touches no weight. Everything that is wrong is reported and
//! the rest is still listed, so that `inspect` can show a damaged checkpoint; only
//! [`crate::Checkpoint::open`] insists on a listing without findings.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    fmt, fs, io,
    path::{Component, Path, PathBuf},
};

use cadre_mapping::{Access, Mapping};
use serde::{
    Deserialize, Deserializer,
    de::{Error as _, MapAccess, Visitor},
};

use crate::{
    catalog::Catalog,
    header::{self, HeaderEntry},
    problem::{About, ProblemKind, Problems},
};

/// Name of the configuration.
pub const CONFIG_FILE: &str = "config.json";
/// Name of the index of a sharded checkpoint.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
/// Name of the only shard of an unsharded checkpoint.
pub const SINGLE_FILE: &str = "model.safetensors";

/// A configuration is a few KB; more is another file.
const MAX_CONFIG_BYTES: u64 = 4 << 20;
/// A header beyond this is read page by page; the length field of a file that is no shard says anything.
const MAX_PREFETCH_BYTES: usize = 4 << 20;
/// V3's index is 9 MB.
const MAX_INDEX_BYTES: usize = 256 << 20;

/// One shard file.
#[derive(Debug)]
pub(crate) struct Shard {
    /// File name inside the directory.
    pub(crate) file: String,
    /// Its bytes.
    pub(crate) mapping: Mapping,
    /// First byte of data.
    pub(crate) data_start: usize,
}

/// The tensors of a directory.
#[derive(Debug, Default)]
pub(crate) struct Listing {
    /// Tensors, and the shards whose header could be read, by file name.
    pub(crate) catalog: Catalog,
    /// Number of shard files that the index names, readable or not.
    pub(crate) shard_files: usize,
    /// Tensors that the index puts into a file that could not be read: not known to be missing.
    pub(crate) hidden: BTreeSet<String>,
    /// The file that a finding about a missing tensor names: the index, or the only shard.
    pub(crate) source: PathBuf,
}

/// The bytes of `config.json`, or the finding why not.
pub(crate) fn read_config(dir: &Path, problems: &mut Problems) -> Option<Vec<u8>> {
    let fix = "point at a Hugging Face checkpoint directory of the DeepSeek-V3 architecture";
    read_bounded(&dir.join(CONFIG_FILE), MAX_CONFIG_BYTES, fix, problems)
}

/// Reads index and headers.
pub(crate) fn read(dir: &Path, problems: &mut Problems, warnings: &mut Problems) -> Listing {
    let index_path = dir.join(INDEX_FILE);
    let single = dir.join(SINGLE_FILE);
    // A broken link counts as an index, so that it is reported instead of passed over.
    if fs::symlink_metadata(&index_path).is_ok() {
        let mut listing = Listing { source: index_path.clone(), ..Listing::default() };
        if let Some(mapping) = map_index(&index_path, problems)
            && let Some(index) = parse_index(&index_path, mapping.bytes(), problems)
        {
            read_sharded(dir, &mut listing, &index, problems, warnings);
        }
        return listing;
    }
    let mut listing = Listing { source: single.clone(), shard_files: 1, ..Listing::default() };
    if fs::symlink_metadata(&single).is_err() {
        listing.shard_files = 0;
        problems.push(About::new(&index_path).file(
            ProblemKind::Unreadable,
            format!("this index, or a single {SINGLE_FILE} beside it"),
            "neither",
            "copy the index and every shard that it names into the directory",
        ));
        return listing;
    }
    if let Some((shard, entries)) = read_shard(dir, SINGLE_FILE, problems) {
        listing.catalog.push_shard(shard);
        entries.iter().for_each(|entry| listing.catalog.push(entry));
        listing.catalog.sort();
    }
    listing
}

fn read_sharded(
    dir: &Path,
    listing: &mut Listing,
    index: &WeightMap<'_>,
    problems: &mut Problems,
    warnings: &mut Problems,
) {
    let about_index = About::new(&listing.source);
    listing.shard_files = index.files.len();
    let name_bytes = index.tensors.iter().map(|(name, _)| name.len()).sum();
    listing.catalog = Catalog::with_capacity(index.tensors.len(), name_bytes);
    // By file name, whatever the order in the index: reports and the model hash depend on it.
    let by_name: BTreeMap<&str, u32> = index.files.iter().map(String::as_str).zip(0..).collect();
    let mut unreadable = BTreeSet::new();
    let mut listed = vec![false; index.tensors.len()];
    for (file, number) in by_name {
        let Some((shard, entries)) = open_named(dir, &about_index, file, problems) else {
            unreadable.insert(number);
            continue;
        };
        let about = About::new(shard.mapping.path());
        listing.catalog.push_shard(shard);
        for entry in &entries {
            let at = index.find(&entry.name);
            if let Some(at) = at.filter(|&at| index.tensors[at].1 == number) {
                listed[at] = true;
                listing.catalog.push(entry);
            } else {
                let named = at.map_or("no entry in the index", |at| index.file(at));
                warnings.push(about.tensor(
                    ProblemKind::ExtraTensor,
                    &entry.name,
                    format!("the index {INDEX_FILE} to name this file for it"),
                    named,
                    "it is ignored; regenerate the index if it should be used",
                ));
            }
        }
    }
    listing.catalog.sort();
    for at in (0..listed.len()).filter(|&at| !listed[at]) {
        let (name, number) = &index.tensors[at];
        listing.hidden.insert(name.to_string());
        if !unreadable.contains(number) {
            problems.push(About::new(&dir.join(index.file(at))).tensor(
                ProblemKind::MissingTensor,
                name,
                format!("the tensor, as {INDEX_FILE} says"),
                "no such tensor in the file's header",
                "fetch this shard again, or regenerate the index",
            ));
        }
    }
}

/// Opens a shard that the index names, which must be a plain file name.
fn open_named(
    dir: &Path,
    about_index: &About,
    file: &str,
    problems: &mut Problems,
) -> Option<(Shard, Vec<HeaderEntry>)> {
    let mut components = Path::new(file).components();
    let plain = matches!(components.next(), Some(Component::Normal(_)))
        && components.next().is_none()
        && !file.contains('\0');
    if !plain {
        problems.push(about_index.field(
            ProblemKind::BadValue,
            "weight_map",
            "names of files in the same directory",
            format!("{:?}", crate::problem::quote(file)),
            "regenerate the index with plain file names",
        ));
        return None;
    }
    read_shard(dir, file, problems)
}

fn read_shard(dir: &Path, file: &str, problems: &mut Problems) -> Option<(Shard, Vec<HeaderEntry>)> {
    let path = dir.join(file);
    let about = About::new(&path);
    let mapping = match Mapping::open(&path) {
        Ok(mapping) => mapping,
        Err(error) => {
            problems.push(about.file(
                ProblemKind::Unreadable,
                "a shard (safetensors file) of the checkpoint",
                error.to_string(),
                "fetch the shard, or correct the index if it names the wrong file",
            ));
            return None;
        }
    };
    fetch_header(&mapping);
    let header = match header::parse(&about, mapping.bytes()) {
        Ok(header) => header,
        Err(problem) => {
            problems.push(problem);
            return None;
        }
    };
    if let Err(problem) = header.check_len(&about, mapping.bytes().len()) {
        problems.push(problem);
    }
    let data_start = header.data_start;
    let _ = mapping.expect(Access::Runs);
    // Headers of a large checkpoint add up to 10 MB that nobody reads again. A refused hint costs
    // only that memory.
    let _ = mapping.release(0..data_start.min(mapping.bytes().len()));
    Some((Shard { file: file.to_owned(), mapping, data_start }, header.entries))
}

/// Has the kernel read exactly the header: a plain fault would read a read-ahead window (8 MiB on some
/// machines) of weights with it, for every shard. Refused hints cost only time.
fn fetch_header(mapping: &Mapping) {
    let _ = mapping.expect(Access::Scattered);
    let bytes = mapping.bytes();
    if let Some(length) = bytes.first_chunk() {
        let length = usize::try_from(u64::from_le_bytes(*length)).unwrap_or(usize::MAX);
        let end = length.saturating_add(header::LENGTH_BYTES).min(bytes.len());
        if end <= MAX_PREFETCH_BYTES {
            let _ = mapping.will_need(0..end);
        }
    }
}

/// The index's `weight_map`, borrowed from the file's bytes: it is large and needed only while reading.
#[derive(Debug, Default)]
struct WeightMap<'a> {
    files: Vec<String>,
    /// (tensor, number of its file), sorted by tensor.
    tensors: Vec<(Cow<'a, str>, u32)>,
}

impl WeightMap<'_> {
    fn find(&self, name: &str) -> Option<usize> {
        self.tensors.binary_search_by(|(tensor, _)| tensor.as_ref().cmp(name)).ok()
    }

    fn file(&self, at: usize) -> &str {
        &self.files[self.tensors[at].1 as usize]
    }
}

/// A string borrowed where it has no escapes.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'de: 'a, 'a> Deserialize<'de> for WeightMap<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pairs;
        impl<'de> Visitor<'de> for Pairs {
            type Value = WeightMap<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object from tensor names to file names")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut numbers: BTreeMap<String, u32> = BTreeMap::new();
                let mut result = WeightMap::default();
                while let Some((Text(name), Text(file))) = map.next_entry()? {
                    let number = match numbers.get(file.as_ref()) {
                        Some(&number) => number,
                        None => {
                            let number = u32::try_from(numbers.len()).map_err(A::Error::custom)?;
                            numbers.insert(file.to_string(), number);
                            result.files.push(file.into_owned());
                            number
                        }
                    };
                    result.tensors.push((name, number));
                }
                result.tensors.sort_unstable();
                match result.tensors.windows(2).find(|pair| pair[0].0 == pair[1].0) {
                    None => Ok(result),
                    Some(pair) => {
                        let name = crate::problem::quote(&pair[0].0);
                        Err(A::Error::custom(format!("`{name}` is given twice")))
                    }
                }
            }
        }
        deserializer.deserialize_map(Pairs)
    }
}

#[derive(Deserialize)]
struct Index<'a> {
    #[serde(borrow)]
    weight_map: WeightMap<'a>,
}

const INDEX_FIX: &str = "fetch the index again";

fn map_index(path: &Path, problems: &mut Problems) -> Option<Mapping> {
    let found = match Mapping::open(path) {
        Ok(mapping) if mapping.bytes().len() <= MAX_INDEX_BYTES => return Some(mapping),
        Ok(mapping) => format!("{} bytes", mapping.bytes().len()),
        Err(error) => error.to_string(),
    };
    let expected = format!("a file of at most {MAX_INDEX_BYTES} bytes");
    problems.push(About::new(path).file(ProblemKind::Unreadable, expected, found, INDEX_FIX));
    None
}

fn parse_index<'a>(path: &Path, bytes: &'a [u8], problems: &mut Problems) -> Option<WeightMap<'a>> {
    let found = match serde_json::from_slice::<Index<'a>>(bytes) {
        Ok(index) if !index.weight_map.tensors.is_empty() => return Some(index.weight_map),
        Ok(_) => "an empty weight_map".to_owned(),
        Err(error) => error.to_string(),
    };
    let expected = "a weight_map from tensor names to file names";
    problems.push(About::new(path).file(ProblemKind::Malformed, expected, found, INDEX_FIX));
    None
}

fn read_bounded(path: &Path, max: u64, fix: &str, problems: &mut Problems) -> Option<Vec<u8>> {
    let about = About::new(path);
    let read = || -> io::Result<Result<Vec<u8>, String>> {
        let metadata = fs::metadata(path)?;
        if !metadata.is_file() {
            return Ok(Err("not a regular file".to_owned()));
        }
        if metadata.len() > max {
            return Ok(Err(format!("{} bytes", metadata.len())));
        }
        fs::read(path).map(Ok)
    };
    let found = match read() {
        Ok(Ok(bytes)) => return Some(bytes),
        Ok(Err(found)) => found,
        Err(error) => error.to_string(),
    };
    let expected = format!("a file of at most {max} bytes");
    problems.push(about.file(ProblemKind::Unreadable, expected, found, fix));
    None
}
