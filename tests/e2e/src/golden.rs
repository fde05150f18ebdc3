//! Texts of the published implementation.

use std::{fs, sync::LazyLock};

use serde::Deserialize;

use crate::binary::root;

/// One greedy generation of `tests/golden/golden.json`.
#[derive(Clone, Debug, Deserialize)]
pub struct Golden {
    /// What the user says.
    pub prompt: String,
    /// Tokens of the rendered prompt.
    pub prompt_ids: Vec<u32>,
    /// Greedy tokens, with the end-of-sequence token if it came.
    pub greedy_ids: Vec<u32>,
    /// Their text.
    pub greedy_text: String,
    /// Distance of the most likely token from the second, at each.
    pub margins: Vec<f32>,
}

#[derive(Deserialize)]
struct File {
    generation: Vec<Golden>,
}

/// Every golden generation.
pub fn all() -> &'static [Golden] {
    static GOLDEN: LazyLock<Vec<Golden>> = LazyLock::new(|| {
        let path = root().join("tests/golden/golden.json");
        let text = fs::read_to_string(&path).expect("tests/golden/golden.json");
        serde_json::from_str::<File>(&text).expect("golden.json has its shape").generation
    });
    &GOLDEN
}

/// "What is a Pod?".
pub fn pod() -> &'static Golden {
    all().iter().find(|golden| golden.prompt == "What is a Pod?").expect("the first golden prompt")
}
