#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{cell::Cell, path::Path, sync::LazyLock};

use proptest::prelude::*;

use super::*;
use crate::Tokenizer;

static POCKET: LazyLock<Tokenizer> = LazyLock::new(|| {
    Tokenizer::load(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/pocket"))).unwrap()
});

fn small() -> Pieces {
    Pieces { piece_bytes: 256, margin_bytes: 96, compared_bytes: 48, longest_bytes: 1 << 20 }
}

/// Where cuts are hard: runs that cross them, special tokens, characters of several bytes.
fn part() -> impl Strategy<Value = String> {
    prop_oneof![
        "[a-z]{1,12}",
        " {1,40}",
        "[0-9]{1,200}",
        "[\\r\\n\\t ]{1,20}",
        "[一-三ァ-ン・ー]{1,60}",
        "[!-/:-@]{1,8}",
        "[a-zA-Z]{200,400}",
        "[🦀éß\u{301}]{1,9}",
        Just("<｜User｜>".to_owned()),
        Just("<｜end▁of▁sentence｜>".to_owned()),
        Just("<｜Us".to_owned()),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn pieces_have_the_ids_of_the_whole(parts in prop::collection::vec(part(), 1..80)) {
        let text = parts.concat();
        let whole = POCKET.encode(&text, false).unwrap();
        let pieces = small().encode(&POCKET.bpe, &text, usize::MAX, &|| false).unwrap();
        prop_assert_eq!(pieces, whole);
    }
}

#[test]
fn long_texts_are_cut_and_have_the_ids_of_the_whole() {
    let text: String = (0..20_000)
        .map(|n| format!("line {n} of 日本語・テスト  with {}{}\n", n * 7919, "<｜User｜>"))
        .collect();
    assert!(text.len() > 10 * PIECE_BYTES);
    let asked = Cell::new(0);
    let stop = || {
        asked.set(asked.get() + 1);
        false
    };
    let ids = POCKET.encode_within(&text, true, usize::MAX, &stop).unwrap();
    assert_eq!(ids, POCKET.encode(&text, true).unwrap());
    assert!(asked.get() > text.len() / PIECE_BYTES, "{} pieces", asked.get());
}

#[test]
fn work_ends_soon_after_it_is_told_to_and_when_there_are_too_many_tokens() {
    let text = "a b c d ".repeat(1 << 20);
    let pieces = Cell::new(0);
    let stop = || pieces.replace(pieces.get() + 1) >= 2;
    let stopped = POCKET.encode_within(&text, false, usize::MAX, &stop).unwrap_err();
    assert!(matches!(stopped, EncodeError::Stopped), "{stopped:?}");
    let long = POCKET.encode_within(&text, false, 4096, &|| false).unwrap_err();
    let EncodeError::TooLong { tokens } = long else { panic!("{long:?}") };
    assert!((4096..2 * PIECE_BYTES).contains(&tokens), "{tokens}: no more than the first piece");
}

#[test]
fn a_stretch_without_a_cut_is_taken_whole_up_to_a_bound() {
    let text = "a".repeat(3 * PIECE_BYTES);
    let ids = POCKET.encode_within(&text, false, usize::MAX, &|| false).unwrap();
    assert_eq!(ids, POCKET.encode(&text, false).unwrap());
    let limited = Pieces { longest_bytes: 1024, ..small() };
    let refused = limited.encode(&POCKET.bpe, &text, usize::MAX, &|| false).unwrap_err();
    assert!(refused.to_string().contains("one word"), "{refused}");
}

#[test]
fn no_text_has_fewer_tokens_than_its_length_allows() {
    assert_eq!(POCKET.least_tokens(""), 0);
    let longest = 38;
    for text in ["a", "hello world", &"日本".repeat(500), &"<｜begin▁of▁sentence｜>".repeat(50)] {
        let least = POCKET.least_tokens(text);
        assert!(least <= POCKET.encode(text, false).unwrap().len(), "{text}: {least}");
        assert!(least >= text.len() / longest, "{text}: {least}");
    }
}

#[test]
fn only_what_matches_rightwards_is_cut() {
    let deepseek = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;
    for regex in [deepseek, r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", r"(?i:'s|'t)|[^]]+"] {
        assert!(looks_rightwards(regex), "{regex}");
    }
    for regex in [r"(?<=a)b", r"(?<!a)b", r"\bword", "^a", "a$", r"(a)\1", r"[a]\Gb"] {
        assert!(!looks_rightwards(regex), "{regex}");
    }
    let part = |text: &str| matches_rightwards(&serde_json::from_str(text).unwrap());
    assert!(!part(r#"{"type": "Metaspace"}"#));
    assert!(!part(
        r#"{"type": "Split", "pattern": {"Regex": "a"}, "behavior": "MergedWithNext", "invert": false}"#
    ));
    assert!(!part(r#"{"type": "ByteLevel", "add_prefix_space": true}"#));
    assert!(Pieces::of(&POCKET.bpe).is_some());
}

/// The bundled tokenizer with a normalizer, which may change what stands on both sides of a cut.
#[test]
fn where_texts_are_encoded_whole_they_have_a_limit_and_the_load_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let pocket = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/pocket"));
    for file in ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"] {
        std::fs::copy(pocket.join(file), folder.path().join(file)).unwrap();
    }
    let path = folder.path().join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    tokenizer["normalizer"] = serde_json::json!({"type": "NFC"});
    std::fs::write(&path, tokenizer.to_string()).unwrap();
    let whole = Tokenizer::load(folder.path()).unwrap();
    let said = whole.warnings().iter().find(|warning| warning.subject == "tokenizer").unwrap();
    assert!(said.fix.contains("more than 1 MiB are refused"), "{said}");
    let text = "a b c d ".repeat(LONGEST_BYTES / 8);
    let ids = whole.encode_within(&text[..100_000], false, usize::MAX, &|| false).unwrap();
    assert_eq!(ids, POCKET.encode(&text[..100_000], false).unwrap());
    let refused = whole.encode_within(&(text + "x"), false, usize::MAX, &|| false).unwrap_err();
    assert!(refused.to_string().contains("at most 1048576 bytes"), "{refused}");
    assert!(POCKET.warnings().iter().all(|warning| warning.subject != "tokenizer"));
}
