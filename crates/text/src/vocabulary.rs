//! What every token stands for, as raw bytes.
//!
//! A byte-level BPE spells each byte as one printable character (the GPT-2 alphabet); this table
//! undoes that once at load, so that decoding is a copy of slices. One token may hold part of a
//! character, so the entries are bytes, not strings. All entries lie in one allocation.

use cadre_types::TokenId;
use tokenizers::Tokenizer as Bpe;

/// Largest vocabulary accepted. Thirty times that of DeepSeek-V3; bounds what a damaged
/// `tokenizer.json` with a wild id can make us allocate (9 bytes per id).
const MAX_TOKENS: usize = 1 << 22;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// The id is a hole.
    Missing,
    Text,
    Special,
}

/// The table; ids are dense from 0 to `len`.
#[derive(Debug)]
pub(crate) struct Vocabulary {
    bytes: Vec<u8>,
    /// End of each token in `bytes`; it begins where the one before ends.
    ends: Vec<u32>,
    kinds: Vec<Kind>,
    longest: Option<usize>,
}

impl Vocabulary {
    pub(crate) fn new(bpe: &Bpe) -> Result<Self, String> {
        let alphabet = Alphabet::new();
        let added = bpe.get_added_tokens_decoder();
        let mut entries: Vec<(TokenId, Kind, Vec<u8>)> = bpe
            .get_vocab(true)
            .into_iter()
            .filter(|(_, id)| !added.contains_key(id))
            .map(|(token, id)| (id, Kind::Text, alphabet.bytes_of(&token)))
            .collect();
        entries.extend(added.iter().map(|(&id, token)| {
            let kind = if token.special { Kind::Special } else { Kind::Text };
            (id, kind, token.content.clone().into_bytes())
        }));
        entries.sort_unstable_by_key(|(id, ..)| *id);
        let last = entries.last().map_or(0, |(id, ..)| *id as usize);
        if last >= MAX_TOKENS {
            return Err(format!("token id {last} is beyond the largest accepted, {MAX_TOKENS}"));
        }
        Self::pack(&entries)
    }

    fn pack(entries: &[(TokenId, Kind, Vec<u8>)]) -> Result<Self, String> {
        let mut table =
            Self { bytes: Vec::new(), ends: Vec::new(), kinds: Vec::new(), longest: longest(entries) };
        for (id, kind, bytes) in entries {
            if (*id as usize) < table.kinds.len() {
                return Err(format!("token id {id} is given twice"));
            }
            while table.kinds.len() < *id as usize {
                table.push(Kind::Missing, &[])?;
            }
            table.push(*kind, bytes)?;
        }
        Ok(table)
    }

    fn push(&mut self, kind: Kind, bytes: &[u8]) -> Result<(), String> {
        self.bytes.extend_from_slice(bytes);
        let end =
            u32::try_from(self.bytes.len()).map_err(|_| "the tokens together exceed 4 GiB".to_owned())?;
        self.ends.push(end);
        self.kinds.push(kind);
        Ok(())
    }

    /// Ids are below this.
    pub(crate) fn len(&self) -> usize {
        self.kinds.len()
    }

    /// Bytes of the longest token; `None` if not every byte has a token, so that parts of a text may vanish.
    pub(crate) fn longest(&self) -> Option<usize> {
        self.longest
    }

    /// The bytes of a token; `None` for an id that is a hole or beyond the table.
    pub(crate) fn bytes_of(&self, id: TokenId) -> Option<&[u8]> {
        let at = id as usize;
        if *self.kinds.get(at)? == Kind::Missing {
            return None;
        }
        let start = at.checked_sub(1).map_or(0, |before| self.ends[before] as usize);
        Some(&self.bytes[start..self.ends[at] as usize])
    }

    pub(crate) fn is_special(&self, id: TokenId) -> bool {
        self.kinds.get(id as usize) == Some(&Kind::Special)
    }

    /// What a token adds to the text: nothing for unknown ids (a model's embedding has more rows than
    /// its tokenizer has tokens, and a row that was never trained can be sampled) and for special
    /// tokens that are to be skipped.
    pub(crate) fn visible(&self, id: TokenId, skip_special: bool) -> &[u8] {
        if skip_special && self.is_special(id) {
            return &[];
        }
        self.bytes_of(id).unwrap_or(&[])
    }

    pub(crate) fn special_ids(&self) -> impl Iterator<Item = TokenId> + Clone + '_ {
        (0..).zip(&self.kinds).filter(|(_, kind)| **kind == Kind::Special).map(|(id, _)| id)
    }
}

/// The longest of the tokens, if every byte is one.
fn longest(entries: &[(TokenId, Kind, Vec<u8>)]) -> Option<usize> {
    let mut single = [false; 256];
    for (_, _, bytes) in entries {
        if let [byte] = bytes.as_slice() {
            single[usize::from(*byte)] = true;
        }
    }
    let longest = entries.iter().map(|(_, _, bytes)| bytes.len()).max()?;
    single.iter().all(|is_token| *is_token).then_some(longest)
}

/// The byte-level alphabet: printable Latin-1 characters stand for themselves, the other 68 bytes for
/// the characters from U+0100 on, in byte order.
struct Alphabet {
    /// Byte by character; the alphabet ends below U+0144.
    byte_of: [Option<u8>; 0x144],
}

impl Alphabet {
    fn new() -> Self {
        let mut byte_of = [None; 0x144];
        let mut substitute = 0x100;
        for byte in 0..=u8::MAX {
            let printable = matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
            let character = if printable {
                usize::from(byte)
            } else {
                substitute += 1;
                substitute - 1
            };
            byte_of[character] = Some(byte);
        }
        Self { byte_of }
    }

    /// A token with a character outside the alphabet was not made by the byte-level step and is
    /// taken as text, as Hugging Face's decoder does.
    fn bytes_of(&self, token: &str) -> Vec<u8> {
        token
            .chars()
            .map(|character| self.byte_of.get(character as usize).copied().flatten())
            .collect::<Option<Vec<u8>>>()
            .unwrap_or_else(|| token.as_bytes().to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alphabet_covers_every_byte_once() {
        let alphabet = Alphabet::new();
        let mut bytes: Vec<u8> = alphabet.byte_of.iter().flatten().copied().collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=u8::MAX).collect::<Vec<_>>());
        assert_eq!(alphabet.bytes_of("Ġthe"), b" the");
        assert_eq!(alphabet.bytes_of("Ċ"), b"\n");
        assert_eq!(alphabet.bytes_of("Ã©"), "é".as_bytes());
        assert_eq!(alphabet.bytes_of("<｜User｜>"), "<｜User｜>".as_bytes());
    }

    #[test]
    fn holes_and_repeats() {
        let entries = vec![(1, Kind::Text, b"a".to_vec()), (3, Kind::Special, b"<s>".to_vec())];
        let table = Vocabulary::pack(&entries).expect("two tokens");
        assert_eq!(table.len(), 4);
        assert_eq!(table.bytes_of(0), None);
        assert_eq!(table.bytes_of(1), Some(&b"a"[..]));
        assert_eq!(table.bytes_of(2), None);
        assert_eq!(table.bytes_of(3), Some(&b"<s>"[..]));
        assert_eq!(table.bytes_of(4), None);
        assert_eq!(table.visible(3, true), b"");
        assert_eq!(table.visible(3, false), b"<s>");
        assert_eq!(table.visible(u32::MAX, false), b"");
        assert_eq!(table.special_ids().collect::<Vec<_>>(), [3]);
        let twice = vec![(1, Kind::Text, b"a".to_vec()), (1, Kind::Text, b"b".to_vec())];
        assert!(Vocabulary::pack(&twice).is_err_and(|reason| reason.contains("id 1")));
    }
}
