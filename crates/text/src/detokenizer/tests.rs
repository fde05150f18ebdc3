#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use proptest::prelude::*;

use crate::tokenizer::tests::pocket;

/// The pieces of a token-by-token decode, the last one from `finish`.
fn pieces(ids: &[u32], skip_special: bool) -> Vec<String> {
    let mut detokenizer = pocket().detokenizer(skip_special);
    let mut pieces = Vec::new();
    for &id in ids {
        let mut piece = String::new();
        detokenizer.push(id, &mut piece);
        assert!(detokenizer.held.len() <= 3, "{:?}", detokenizer.held);
        assert_eq!(detokenizer.holds_partial_character(), !detokenizer.held.is_empty());
        pieces.push(piece);
    }
    let mut last = String::new();
    detokenizer.finish(&mut last);
    pieces.push(last);
    pieces
}

#[test]
fn a_character_appears_when_its_last_byte_does() {
    // 日 is three tokens of one byte each, 🙂 is one of two bytes and two of one.
    let ids = pocket().encode("日🙂", false).unwrap();
    assert_eq!(ids.len(), 6);
    assert_eq!(pieces(&ids, true), ["", "", "日", "", "", "🙂", ""]);
}

#[test]
fn broken_characters_are_replaced_once_it_is_certain() {
    let tokenizer = pocket();
    let ids = tokenizer.encode("日", false).unwrap();
    let letter = tokenizer.encode("a", false).unwrap()[0];
    assert_eq!(pieces(&ids[..2], true), ["", "", "\u{fffd}"]);
    assert_eq!(pieces(&[ids[0], letter], true), ["", "\u{fffd}a", ""]);
    assert_eq!(pieces(&[ids[1], letter], true), ["\u{fffd}", "a", ""]);
    assert_eq!(pieces(&[ids[0], ids[0], ids[1], ids[2]], true), ["", "\u{fffd}", "", "日", ""]);
}

/// Where each token's text begins in the whole, in characters.
fn offsets(ids: &[u32]) -> Vec<usize> {
    let mut detokenizer = pocket().detokenizer(true);
    let mut text = String::new();
    let offset = |&id| {
        let before = text.chars().count();
        before + detokenizer.push(id, &mut text)
    };
    ids.iter().map(offset).collect()
}

#[test]
fn a_token_knows_where_its_text_begins() {
    let tokenizer = pocket();
    let ids = tokenizer.encode("日 b", false).unwrap();
    let letter = *ids.last().unwrap();
    assert_eq!(tokenizer.decode(&ids, true), "日 b");
    assert_eq!(offsets(&ids), [0, 0, 0, 1]);
    // 日 broken off, then a letter; then a continuation byte alone.
    assert_eq!(offsets(&[ids[0], ids[1], letter, ids[1], letter]), [0, 0, 1, 3, 4]);
    // Two beginnings, of which the first is broken.
    assert_eq!(offsets(&[ids[0], ids[0], ids[1], ids[2], letter]), [0, 1, 1, 1, 2]);
    let special = tokenizer.encode("<｜User｜>", false).unwrap()[0];
    assert_eq!(offsets(&[ids[0], special, ids[1], ids[2], special, letter]), [0, 0, 0, 0, 1, 1]);
}

#[test]
fn special_tokens_are_skipped_or_shown() {
    let tokenizer = pocket();
    let ids = tokenizer.encode("<｜User｜>hi<｜end▁of▁sentence｜>", false).unwrap();
    assert_eq!(pieces(&ids, true).concat(), "hi");
    assert_eq!(pieces(&ids, false).concat(), "<｜User｜>hi<｜end▁of▁sentence｜>");
    // Skipped ones do not interrupt a character, as in a decode of all at once.
    let parts = tokenizer.encode("日", false).unwrap();
    let around = [parts[0], ids[0], parts[1], parts[2]];
    assert_eq!(pieces(&around, true).concat(), "日");
    assert_eq!(pieces(&around, false).concat(), "\u{fffd}<｜User｜>\u{fffd}\u{fffd}");
}

#[test]
fn unknown_ids_add_nothing() {
    assert_eq!(pieces(&[4096, u32::MAX], false).concat(), "");
}

#[test]
fn finish_makes_ready_for_a_new_text() {
    let tokenizer = pocket();
    let ids = tokenizer.encode("日", false).unwrap();
    let mut detokenizer = tokenizer.detokenizer(true);
    let mut out = String::new();
    detokenizer.push(ids[0], &mut out);
    detokenizer.finish(&mut out);
    for &id in &ids {
        detokenizer.push(id, &mut out);
    }
    assert_eq!(out, "\u{fffd}日");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Half of the ids are among the single bytes, so that broken and split characters are common.
    #[test]
    fn pieces_join_to_the_decode_of_all(
        ids in prop::collection::vec(prop_oneof![0..300_u32, 0..4200_u32], 0..60),
        skip_special: bool,
    ) {
        let pieces = pieces(&ids, skip_special);
        let whole = pocket().decode(&ids, skip_special);
        prop_assert_eq!(pieces.concat(), &whole[..]);
        prop_assert_eq!(pocket().reference_decode(&ids, skip_special), whole);
    }

    #[test]
    fn valid_text_never_shows_a_replacement(text in "\\PC{0,40}") {
        prop_assume!(!text.contains('\u{fffd}'));
        let ids = pocket().encode(&text, false).unwrap();
        for piece in pieces(&ids, false) {
            prop_assert!(!piece.contains('\u{fffd}'), "{piece:?} in {text:?}");
        }
    }
}
