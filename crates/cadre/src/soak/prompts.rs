//! What is asked, and what must be answered.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    sync::{Mutex, PoisonError},
};

use anyhow::{Context, Result, ensure};

/// Short, and different in length.
const BUILT_IN: [&str; 8] = [
    "What is a Pod?",
    "Explain ownership.",
    "What does \"reconcile\" mean?",
    "How do I upgrade a release?",
    "What is a Service in Kubernetes, and how does it find its Pods?",
    "Write a sentence about borrowing.",
    "Why?",
    "What happens to the requests in flight when a node that runs one of the replicas is lost?",
];

/// One thing to ask.
#[derive(Debug)]
pub(super) struct Prompt {
    pub(super) text: String,
    index: usize,
}

/// All of them, and the texts that they get.
#[derive(Debug)]
pub(super) struct Prompts {
    prompts: Vec<Prompt>,
    /// By prompt; filled from the file, or by the first answer.
    expected: Mutex<Vec<Option<String>>>,
}

impl Prompts {
    /// Reads the files; what is not given comes from the other or is built in.
    pub(super) fn load(prompts: Option<&Path>, expect: Option<&Path>) -> Result<Self> {
        let expected: BTreeMap<String, String> = match expect {
            Some(path) => {
                let text = fs::read(path).with_context(|| format!("read {}", path.display()))?;
                serde_json::from_slice(&text)
                    .with_context(|| format!("{} is no JSON object of prompts and texts", path.display()))?
            }
            None => BTreeMap::new(),
        };
        let texts: Vec<String> = match prompts {
            Some(path) => {
                let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
                text.lines().map(str::trim).filter(|line| !line.is_empty()).map(String::from).collect()
            }
            None if expect.is_some() => expected.keys().cloned().collect(),
            None => BUILT_IN.map(String::from).to_vec(),
        };
        ensure!(!texts.is_empty(), "there is no prompt");
        Ok(Self::new(texts, &expected))
    }

    fn new(texts: Vec<String>, expected: &BTreeMap<String, String>) -> Self {
        let wanted = texts.iter().map(|text| expected.get(text).cloned()).collect();
        let prompts = texts.into_iter().enumerate().map(|(index, text)| Prompt { text, index }).collect();
        Self { prompts, expected: Mutex::new(wanted) }
    }

    pub(super) fn len(&self) -> usize {
        self.prompts.len()
    }

    /// The prompt of the n-th request of a stream.
    pub(super) fn of_turn(&self, turn: usize) -> &Prompt {
        &self.prompts[turn % self.prompts.len()]
    }

    /// Compares an answer with the expected one, which is returned if it is another; the first answer to a
    /// prompt without one becomes it.
    pub(super) fn judge(&self, prompt: &Prompt, text: &str) -> Result<(), String> {
        let mut expected = self.expected.lock().unwrap_or_else(PoisonError::into_inner);
        match &expected[prompt.index] {
            Some(wanted) if wanted == text => Ok(()),
            Some(wanted) => Err(wanted.clone()),
            None => {
                expected[prompt.index] = Some(text.to_owned());
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_answer_is_the_measure_unless_a_text_is_given() {
        let expected = BTreeMap::from([("given".to_owned(), "right".to_owned())]);
        let prompts = Prompts::new(vec!["given".into(), "free".into()], &expected);
        let (given, free) = (prompts.of_turn(0), prompts.of_turn(1));
        assert_eq!(prompts.judge(given, "wrong"), Err("right".into()));
        assert_eq!(prompts.judge(given, "right"), Ok(()));
        assert_eq!(prompts.judge(free, "first"), Ok(()));
        assert_eq!(prompts.judge(free, "second"), Err("first".into()));
        assert_eq!(prompts.of_turn(2).text, "given");
    }

    #[test]
    fn prompts_come_from_the_expectations_when_no_file_names_them() {
        let folder = tempfile::tempdir().expect("a folder");
        let (expect, list) = (folder.path().join("expect.json"), folder.path().join("prompts"));
        fs::write(&expect, r#"{"b": "2", "a": "1"}"#).expect("write");
        fs::write(&list, "c\n\n a \n").expect("write");
        let texts =
            |prompts: Prompts| prompts.prompts.into_iter().map(|prompt| prompt.text).collect::<Vec<_>>();
        assert_eq!(texts(Prompts::load(None, Some(&expect)).expect("both")), ["a", "b"]);
        assert_eq!(texts(Prompts::load(Some(&list), Some(&expect)).expect("both")), ["c", "a"]);
        assert_eq!(Prompts::load(None, None).expect("built in").len(), BUILT_IN.len());
        fs::write(&list, "\n").expect("write");
        Prompts::load(Some(&list), None).expect_err("nothing to ask");
        fs::write(&expect, "[]").expect("write");
        Prompts::load(None, Some(&expect)).expect_err("no object");
    }
}
