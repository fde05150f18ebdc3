//! The commands of our pages, run as they stand there.
//!
//! Above every fenced block of a page stands a comment that says what becomes of it, so that nobody can add a
//! command that nothing runs without saying why:
//!
//! | comment | the block is |
//! |---|---|
//! | `<!-- run: local -->` | run on this machine |
//! | `<!-- run: server -->` | one command that goes on until the next `server` or `alone` |
//! | `<!-- run: alone -->` | as `local`, with no server beside it |
//! | `<!-- run: cluster -->` | run against a Kubernetes |
//! | `<!-- run: cluster, last -->` | the same, after all others of its page |
//! | `<!-- run: output -->` | a table that the block before it prints, but for the last column |
//! | `<!-- run: spec -->` | a part of a model's spec: `cadre operator plan` admits the sample with it |
//! | `<!-- run: no, REASON -->` | not run |

use std::{fs, path::Path};

use crate::{binary::root, golden};

mod shell;

pub use shell::Shell;

/// What becomes of a block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Run {
    /// On this machine.
    Local,
    /// A command that goes on.
    Server,
    /// On this machine, without a server.
    Alone,
    /// Against a Kubernetes; `true`: after all others.
    Cluster(bool),
    /// What the block before prints.
    Output,
    /// Part of a model's spec.
    Spec,
    /// Not at all, for this reason.
    No(String),
}

/// A fenced block.
#[derive(Clone, Debug)]
pub struct Block {
    /// Where it stands: `README.md:24`.
    pub place: String,
    /// What is between the fences.
    pub text: String,
    /// What becomes of it.
    pub run: Run,
}

/// The blocks of a page, named from the repository's root.
///
/// # Errors
///
/// One line for every block without a comment, or with one that says nothing known.
pub fn read(page: &str) -> Result<Vec<Block>, String> {
    let text =
        fs::read_to_string(root().join(Path::new(page))).map_err(|error| format!("{page}: {error}"))?;
    parse(page, &text)
}

fn parse(page: &str, text: &str) -> Result<Vec<Block>, String> {
    let (mut blocks, mut faults) = (Vec::new(), Vec::new());
    let lines: Vec<&str> = text.lines().collect();
    let mut at = 0;
    while at < lines.len() {
        if !lines[at].trim_start().starts_with("```") {
            at += 1;
            continue;
        }
        let place = format!("{page}:{}", at + 1);
        let length = lines[at + 1..].iter().position(|line| line.trim_start().starts_with("```"));
        let Some(length) = length else {
            faults.push(format!("{place}: the block does not end"));
            break;
        };
        match at.checked_sub(1).map_or(Err("nothing"), |above| directive(lines[above])) {
            Ok(run) => blocks.push(Block { place, text: lines[at + 1..=at + length].join("\n"), run }),
            Err(found) => faults.push(format!(
                "{place}: above a block stands what becomes of it (`<!-- run: … -->`, tests/e2e/src/document.rs), not \
                 {found:?}"
            )),
        }
        at += length + 2;
    }
    if faults.is_empty() { Ok(blocks) } else { Err(faults.join("\n")) }
}

fn directive(line: &str) -> Result<Run, &str> {
    let words = line.trim().strip_prefix("<!-- run: ").and_then(|rest| rest.strip_suffix(" -->"));
    Ok(match words.ok_or(line)? {
        "local" => Run::Local,
        "server" => Run::Server,
        "alone" => Run::Alone,
        "cluster" => Run::Cluster(false),
        "cluster, last" => Run::Cluster(true),
        "output" => Run::Output,
        "spec" => Run::Spec,
        other => match other.strip_prefix("no, ") {
            Some(reason) if !reason.trim().is_empty() => Run::No(reason.trim().to_owned()),
            _ => return Err(line),
        },
    })
}

impl Block {
    /// Its commands: lines, where one that ends in a backslash goes on; comments and empty lines are none.
    pub fn commands(&self) -> Vec<String> {
        let mut commands: Vec<String> = Vec::new();
        let mut goes_on = false;
        for line in self.text.lines() {
            match commands.last_mut().filter(|_| goes_on) {
                Some(command) => {
                    command.push('\n');
                    command.push_str(line);
                }
                None if line.trim().is_empty() || line.trim_start().starts_with('#') => continue,
                None => commands.push(line.to_owned()),
            }
            goes_on = line.ends_with('\\');
        }
        commands
    }

    /// Where the block asks the bundled checkpoint greedily by HTTP, what it printed must be the golden answer.
    ///
    /// # Panics
    ///
    /// If it is another.
    pub fn assert_answer(&self, printed: &str) {
        if !(self.text.contains("What is a Pod?") && self.text.contains("\"temperature\": 0")) {
            return;
        }
        let answer: serde_json::Value = serde_json::from_str(printed)
            .unwrap_or_else(|error| panic!("{}: {error}: {printed}", self.place));
        let text = answer["choices"][0]["message"]["content"].as_str();
        assert_eq!(text, Some(golden::pod().greedy_text.as_str()), "{}: {printed}", self.place);
    }

    /// Holds a table that was printed against the one on the page: the same words but for the last column, which is an age.
    ///
    /// # Panics
    ///
    /// If they differ.
    pub fn assert_printed(&self, printed: &str) {
        let words = |text: &str| -> Vec<Vec<String>> {
            let lines = text.lines().filter(|line| !line.trim().is_empty());
            lines
                .enumerate()
                .map(|(at, line)| {
                    let mut words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
                    // The heading is the same to the last word.
                    words.truncate(if at == 0 { usize::MAX } else { words.len().saturating_sub(1) });
                    words
                })
                .collect()
        };
        assert_eq!(
            words(&self.text),
            words(printed),
            "{}: the block before it printed\n{printed}",
            self.place
        );
    }
}

/// The blocks that [`Run::Cluster`] means, in the order in which they run, each with what it must print.
pub fn on_cluster(blocks: &[Block]) -> Vec<(&Block, Option<&Block>)> {
    let with_output = |(at, block): (usize, &'_ Block)| {
        let output = blocks.get(at + 1).filter(|next| next.run == Run::Output).map(|_| at + 1);
        (matches!(block.run, Run::Cluster(_))).then_some((at, output))
    };
    let mut found: Vec<(usize, Option<usize>)> = blocks.iter().enumerate().filter_map(with_output).collect();
    found.sort_by_key(|(at, _)| (blocks[*at].run == Run::Cluster(true), *at));
    found.into_iter().map(|(at, output)| (&blocks[at], output.map(|output| &blocks[output]))).collect()
}
