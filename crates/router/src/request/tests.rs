#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{path::Path, sync::LazyLock};

use cadre_types::NumericsClass;

use super::*;

static MODEL: LazyLock<ServedModel> = LazyLock::new(|| {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/pocket");
    ServedModel::load(Path::new(dir), None, NumericsClass::Bf16).unwrap()
});

fn context(capacity_tokens: Option<u64>) -> Context {
    Context { request_id: "r".into(), drawn_seed: 5, capacity_tokens, max_sequences: 8 }
}

fn submission(prompt_tokens: usize) -> Submission {
    Submission { inputs: vec![Input::Tokens(vec![7; prompt_tokens])], ..Submission::default() }
}

fn length(submission: Submission, capacity_tokens: Option<u64>) -> RequestResult<u32> {
    prepare(&MODEL, submission, &context(capacity_tokens)).map(|sequences| sequences[0].max_tokens)
}

#[test]
fn the_folder_names_the_model() {
    assert_eq!(MODEL.name, "pocket");
}

#[test]
fn the_answer_is_cut_to_the_context_and_an_open_end_to_the_cache() {
    assert_eq!(length(submission(96), None), Ok(4000));
    assert_eq!(length(Submission { max_tokens: Some(9), ..submission(96) }, Some(64)), Ok(9));
    assert_eq!(length(Submission { max_tokens: Some(9000), ..submission(96) }, Some(64)), Ok(4000));
    // Three pages and a bit: whole pages count.
    assert_eq!(length(submission(96), Some(3 * 64 + 5)), Ok(96));
    // Nothing fits: the worker will say so, with its numbers.
    assert_eq!(length(submission(96), Some(64)), Ok(1));
    assert_eq!(length(submission(4095), None), Ok(1));
    let long = length(submission(4096), None).unwrap_err();
    assert_eq!(long, RequestError::PromptTooLong { prompt_tokens: 4096, context_tokens: 4096 });
}

#[test]
fn seeds_follow_the_requests_and_ids_differ() {
    let two =
        Submission { n: 2, inputs: vec![Input::Tokens(vec![1]), Input::Tokens(vec![2])], ..submission(0) };
    let seeds = |submission: Submission| {
        let sequences = prepare(&MODEL, submission, &context(None)).unwrap();
        let ids: Vec<String> = sequences.iter().map(|sequence| sequence.request_id.clone()).collect();
        assert_eq!(ids, ["r-0", "r-1", "r-2", "r-3"]);
        sequences.iter().map(|sequence| sequence.sampling.seed).collect::<Vec<_>>()
    };
    assert_eq!(seeds(two.clone()), [5, 6, 7, 8], "a drawn seed");
    let mut last = two;
    last.sampling.seed = Some(u64::MAX);
    assert_eq!(seeds(last), [u64::MAX, 0, 1, 2]);
}

#[test]
fn the_number_of_sequences_is_bounded_before_anything_is_tokenized() {
    let many = Submission { n: 3, inputs: vec![Input::Text("a".into()); 3], ..submission(0) };
    let error = prepare(&MODEL, many, &context(None)).unwrap_err();
    assert!(error.to_string().contains("9 sequences, at most 8"), "{error}");
}

#[test]
fn eos_is_a_stop_id_unless_ignored_and_ids_are_not_repeated() {
    let eos = MODEL.tokenizer.eos_ids()[0];
    let stops = |ignore_eos| {
        let submission = Submission { stop_token_ids: vec![9, eos, 9], ignore_eos, ..submission(1) };
        prepare(&MODEL, submission, &context(None)).unwrap()[0].stop_token_ids.clone()
    };
    assert_eq!(stops(false), [eos, 9]);
    let submission = Submission { stop_token_ids: vec![9], ignore_eos: true, ..submission(1) };
    assert_eq!(prepare(&MODEL, submission, &context(None)).unwrap()[0].stop_token_ids, [9]);
}
