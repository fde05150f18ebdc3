#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    path::{Path, PathBuf},
    sync::LazyLock,
};

use cadre_types::{FinishReason, NumericsClass};

use cadre_checkpoint::WeightsOptions;

use super::*;

static MODEL: LazyLock<ServedModel> = LazyLock::new(|| {
    ServedModel::load(&dir(), &WeightsOptions::default(), None, NumericsClass::Bf16).unwrap()
});

fn dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/pocket")
}

fn context(capacity_tokens: Option<u64>) -> Context {
    let limit_tokens = limit_tokens(&MODEL, capacity_tokens);
    Context { request_id: "r".into(), drawn_seed: 5, limit_tokens, max_sequences: 8, deadline: None }
}

fn prepare(
    model: &ServedModel,
    submission: Submission,
    context: &Context,
) -> RequestResult<Vec<PreparedSequence>> {
    super::prepare(model, submission, context, &|| false)
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
fn the_answer_is_cut_to_the_longest_sequence_served_however_it_was_asked_for() {
    assert_eq!(length(submission(96), None), Ok(4000));
    // Three pages and a bit: whole pages count.
    let caches = [(None, 4000), (Some(1 << 20), 4000), (Some(3 * 64 + 5), 96)];
    for (capacity_tokens, room) in caches {
        assert_eq!(length(submission(96), capacity_tokens), Ok(room));
        for (asked, given) in [(9, 9), (9000, room)] {
            let asking = Submission { max_tokens: Some(asked), ..submission(96) };
            assert_eq!(length(asking, capacity_tokens), Ok(given));
        }
    }
    assert_eq!(length(submission(4095), None), Ok(1));
    for (prompt_tokens, capacity_tokens, limit_tokens) in [(4096, None, 4096), (96, Some(64), 64)] {
        let long = length(submission(prompt_tokens), capacity_tokens).unwrap_err();
        let said = RequestError::PromptTooLong {
            prompt_tokens,
            at_least: false,
            limit_tokens,
            context_tokens: 4096,
        };
        assert_eq!(long, said);
    }
}

#[test]
fn a_prompt_that_no_sequence_holds_is_refused_by_its_length_and_never_tokenized() {
    let megabytes = "a ".repeat(4 << 20);
    let text = Submission { inputs: vec![Input::Text(megabytes)], ..Submission::default() };
    let RequestError::PromptTooLong { prompt_tokens, at_least, .. } =
        refuse_by_length(&MODEL, &text, 4096).unwrap_err()
    else {
        panic!("another error")
    };
    assert!(at_least && prompt_tokens > 200_000, "{prompt_tokens}");
    // A conversation may lose text in its template, so it is rendered first.
    let message = ChatMessage::text("user", "a ".repeat(1 << 20));
    let chat = Input::Chat { messages: vec![message], variables: Map::new() };
    let chat = Submission { inputs: vec![chat], ..Submission::default() };
    assert_eq!(refuse_by_length(&MODEL, &chat, 4096), Ok(()));
    let asked = std::cell::Cell::new(0);
    let stop = || {
        asked.set(asked.get() + 1);
        false
    };
    let error = super::prepare(&MODEL, chat, &context(None), &stop).unwrap_err();
    assert!(matches!(error, RequestError::PromptTooLong { at_least: true, .. }), "{error}");
    assert_eq!(asked.get(), 0, "nothing was tokenized");
    let stopped = Submission { inputs: vec![Input::Text("hello".into())], ..Submission::default() };
    assert_eq!(
        super::prepare(&MODEL, stopped, &context(None), &|| true).unwrap_err(),
        RequestError::Cancelled
    );
}

#[test]
fn messages_are_checked_for_every_front_door() {
    let refused = |message: ChatMessage| {
        let first = ChatMessage::text("user", "a");
        let chat = Input::Chat { messages: vec![first, message], variables: Map::new() };
        let submission = Submission { inputs: vec![chat], ..Submission::default() };
        match prepare(&MODEL, submission, &context(None)).unwrap_err() {
            RequestError::Invalid { field, .. } => field.into_owned(),
            other => panic!("{other}"),
        }
    };
    assert_eq!(refused(ChatMessage::text("tool", "4")), "messages[1].role");
    assert_eq!(refused(ChatMessage::text("function", "4")), "messages[1].role");
    assert_eq!(refused(ChatMessage::text("wizard", "4")), "messages[1].role");
    let mut call = ChatMessage { content: None, ..ChatMessage::text("assistant", "") };
    call.extra.insert("tool_calls".into(), serde_json::json!([{"id": "x"}]));
    assert_eq!(refused(call), "messages[1].tool_calls");
    assert_eq!(
        refused(ChatMessage { content: None, ..ChatMessage::text("user", "") }),
        "messages[1].content"
    );
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

#[test]
fn whose_fault_a_template_is_decides_the_status() {
    let of = |error: TemplateError| {
        let error = template_error(error);
        (error.http_status(), error.openai_code(), error.code())
    };
    let reason = || "x".to_owned();
    let unavailable = (501, "chat_unavailable", tonic::Code::Unimplemented);
    assert_eq!(of(TemplateError::Missing), unavailable);
    assert_eq!(of(TemplateError::Unusable { reason: reason() }), unavailable);
    assert_eq!(of(TemplateError::Gap { reason: reason() }), unavailable);
    let callers = (400, "invalid_value", tonic::Code::InvalidArgument);
    assert_eq!(of(TemplateError::Raised { message: reason() }), callers);
    assert_eq!(of(TemplateError::Role { index: 0, role: reason() }), callers);
}

#[test]
fn a_stop_string_may_spell_a_special_token() {
    let (id, text) = MODEL.tokenizer.special_texts().nth(3).unwrap();
    let submission = Submission { stop: vec![text.to_owned()], ..submission(1) };
    let sequence = prepare(&MODEL, submission, &context(None)).unwrap().remove(0);
    let model =
        Arc::new(ServedModel::load(&dir(), &WeightsOptions::default(), None, NumericsClass::Bf16).unwrap());
    let mut output = crate::output::TextOutput::new(model, sequence.stops, 1);
    let token = |token| v1::GeneratedToken { token, ..Default::default() };
    let letter = MODEL.tokenizer.encode("a", false).unwrap()[0];
    let first = output.push(token(letter));
    assert_eq!((first.text.as_str(), first.finish), ("a", None));
    let last = output.push(token(id));
    assert_eq!((last.text.as_str(), last.finish.map(|finish| finish.reason)), ("", Some(FinishReason::Stop)));
}

#[test]
fn offsets_count_the_characters_of_the_answer() {
    let model =
        Arc::new(ServedModel::load(&dir(), &WeightsOptions::default(), None, NumericsClass::Bf16).unwrap());
    let stops = StopStrings::new(vec!["zz".to_owned()], false).unwrap();
    let mut output = crate::output::TextOutput::new(model, stops, 1);
    let ids = MODEL.tokenizer.encode("木 Úz", false).unwrap();
    let (mut text, mut offsets) = (String::new(), Vec::new());
    for token in ids {
        let chunk = output.push(v1::GeneratedToken { token, ..Default::default() });
        text.push_str(&chunk.text);
        offsets.extend(chunk.text_offsets);
    }
    text.push_str(&output.finish(FinishReason::Length).text);
    assert_eq!(text, "木 Úz", "z was held back");
    // Each token's place in the text is where its first byte's character is.
    let characters = text.chars().count();
    assert!(offsets.is_sorted() && offsets.iter().all(|&offset| offset < characters), "{offsets:?}");
    assert_eq!((offsets[..3].to_vec(), offsets.last()), (vec![0, 0, 0], Some(&3)));
}
