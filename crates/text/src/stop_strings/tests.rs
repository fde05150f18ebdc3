#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use proptest::prelude::*;

use super::*;

fn run(stops: &[&str], include: bool, pieces: &[&str]) -> (String, Option<usize>) {
    let stops = stops.iter().map(|stop| (*stop).to_owned()).collect();
    let mut matcher = StopStrings::new(stops, include).unwrap();
    let mut out = String::new();
    let mut matched = None;
    for piece in pieces {
        matched = matcher.push(piece, &mut out);
    }
    matcher.finish(&mut out);
    (out, matched)
}

#[test]
fn text_before_the_match_is_emitted_and_the_match_is_not() {
    assert_eq!(run(&["\n\n"], false, &["a\nb", "\n", "\nc", "d"]), ("a\nb".into(), Some(0)));
    assert_eq!(run(&["\n\n"], true, &["a\nb", "\n", "\nc", "d"]), ("a\nb\n\n".into(), Some(0)));
    assert_eq!(run(&["END"], false, &["EN", "EN", "DX"]), ("EN".into(), Some(0)));
    assert_eq!(run(&[], false, &["a", "b"]), ("ab".into(), None));
}

#[test]
fn what_was_held_back_is_flushed_at_the_end() {
    assert_eq!(run(&["END"], false, &["the E", "N"]), ("the EN".into(), None));
}

#[test]
fn only_what_may_begin_a_stop_string_is_held_back() {
    let mut matcher = StopStrings::new(vec!["abcd".into(), "bx".into()], false).unwrap();
    let mut out = String::new();
    assert_eq!(matcher.push("zzab", &mut out), None);
    assert_eq!(out, "zz");
    assert_eq!(matcher.push("q", &mut out), None);
    assert_eq!(out, "zzabq");
    assert_eq!(matcher.push("b", &mut out), None);
    assert_eq!(out, "zzabq");
    assert_eq!(matcher.push("x!", &mut out), Some(1));
    assert_eq!(out, "zzabq");
    assert_eq!(matcher.matched(), Some("bx"));
    assert_eq!(matcher.push("more", &mut out), Some(1));
    matcher.finish(&mut out);
    assert_eq!(out, "zzabq");
}

#[test]
fn the_match_that_ends_first_wins_then_the_longer() {
    assert_eq!(run(&["bcd", "b"], false, &["abcd"]), ("a".into(), Some(1)));
    assert_eq!(run(&["c", "abc"], false, &["xabc"]), ("x".into(), Some(1)));
}

#[test]
fn stops_of_several_bytes_per_character() {
    assert_eq!(run(&["。終"], false, &["はい。", "終わり"]), ("はい".into(), Some(0)));
    assert_eq!(run(&["é!"], false, &["caf", "é", "?"]), ("café?".into(), None));
}

#[test]
fn bounds_are_typed() {
    let many = vec!["x".to_owned(); MAX_STOP_STRINGS + 1];
    assert_eq!(StopStrings::new(many, false).unwrap_err(), StopStringsError::TooMany { count: 17 });
    let empty = vec!["x".to_owned(), String::new()];
    assert_eq!(StopStrings::new(empty, false).unwrap_err(), StopStringsError::Empty { index: 1 });
    let long = vec!["x".repeat(257)];
    assert_eq!(
        StopStrings::new(long, false).unwrap_err(),
        StopStringsError::TooLong { index: 0, bytes: 257 }
    );
    assert!(StopStrings::new(vec!["x".repeat(256); 16], false).is_ok());
}

/// The definition, over the whole text: try every end, then every start.
fn naive(text: &str, stops: &[String], include: bool) -> (String, Option<usize>) {
    for end in 0..=text.len() {
        for start in 0..end {
            if let Some(index) = stops.iter().position(|s| s.as_bytes() == &text.as_bytes()[start..end]) {
                let cut = if include { end } else { start };
                return (text[..cut].to_owned(), Some(index));
            }
        }
    }
    (text.to_owned(), None)
}

/// Pieces in angle brackets are special tokens, hidden from the text.
fn run_hidden(stops: &[&str], include: bool, pieces: &[&str]) -> (String, Option<usize>) {
    let stops = stops.iter().map(|stop| (*stop).to_owned()).collect();
    let mut matcher = StopStrings::new(stops, include).unwrap().spelling(["<U>", "<E>"].into_iter());
    let mut out = String::new();
    for piece in pieces {
        match piece.starts_with('<') {
            true => matcher.push_hidden(piece, &mut out),
            false => matcher.push(piece, &mut out),
        };
    }
    matcher.finish(&mut out);
    (out, matcher.matched)
}

#[test]
fn a_stop_string_that_spells_a_special_token_matches_it() {
    assert_eq!(run_hidden(&["<U>"], false, &["ab", "<U>", "c"]), ("ab".into(), Some(0)));
    assert_eq!(run_hidden(&["x", "b<U>\n"], false, &["a", "b", "<U>", "\n", "c"]), ("a".into(), Some(1)));
    assert_eq!(run_hidden(&["b<U>\n"], true, &["a", "b", "<U>", "\n", "c"]), ("ab\n".into(), Some(0)));
    // Spelled by ordinary tokens too.
    assert_eq!(run_hidden(&["<U>"], false, &["a", "b<", "U>", "c"]), ("ab".into(), Some(0)));
}

#[test]
fn hidden_tokens_are_never_handed_out_and_hide_no_stop_string() {
    assert_eq!(run_hidden(&["<U>"], false, &["a", "<E>", "b"]), ("ab".into(), None));
    assert_eq!(run_hidden(&["<U>z"], false, &["a", "<U>", "b"]), ("ab".into(), None));
    assert_eq!(run_hidden(&["ab", "<U>"], false, &["x", "a", "<E>", "b", "<U>"]), ("x".into(), Some(0)));
    assert_eq!(run_hidden(&["<U>"], false, &["a", "<E>", "<U>"]), ("a".into(), Some(0)));
    // Not a spelling of a whole token.
    assert_eq!(run_hidden(&["U"], false, &["a", "<U>", "b"]), ("ab".into(), None));
    // Held back across a hidden token, then not a stop string after all.
    assert_eq!(run_hidden(&["abc", "<U>"], false, &["a", "<E>", "b", "<E>", "d"]), ("abd".into(), None));
}

proptest! {
    // A small alphabet with a two-byte letter makes overlaps and near misses common.
    #[test]
    fn any_division_gives_the_answer_of_the_definition(
        text in "[abé]{0,40}",
        stops in prop::collection::vec("[abé]{1,5}", 0..4),
        include: bool,
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
    ) {
        let mut bounds: Vec<usize> = cuts.iter().map(|cut| cut.index(text.len() + 1)).filter(|&at| text.is_char_boundary(at)).collect();
        bounds.extend([0, text.len()]);
        bounds.sort_unstable();
        let mut matcher = StopStrings::new(stops.clone(), include).unwrap();
        let mut out = String::new();
        let mut matched = None;
        let longest = stops.iter().map(String::len).max().unwrap_or(1);
        for pair in bounds.windows(2) {
            matched = matcher.push(&text[pair[0]..pair[1]], &mut out);
            prop_assert!(matcher.held.len() < longest, "held {} of {longest}", matcher.held.len());
        }
        matcher.finish(&mut out);
        prop_assert_eq!((out, matched), naive(&text, &stops, include));
    }
}
