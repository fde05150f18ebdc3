//! What our pages tell a reader to type does what they say. What needs a Kubernetes runs in `tests/e2e-k8s`.

use cadre_e2e::{
    document::{self, Block, Run, Shell},
    golden,
};

/// Pages whose commands are run.
const PAGES: [&str; 2] = ["README.md", "docs/operations.md"];

fn blocks(page: &str) -> Vec<Block> {
    document::read(page).unwrap_or_else(|faults| panic!("{faults}"))
}

#[test]
fn every_block_says_what_becomes_of_it() {
    for page in PAGES {
        let blocks = blocks(page);
        assert!(blocks.iter().any(|block| block.run != Run::Output), "{page}: nothing is run");
        for (at, block) in blocks.iter().enumerate().filter(|(_, block)| block.run == Run::Output) {
            let before = at.checked_sub(1).map(|before| &blocks[before].run);
            assert!(matches!(before, Some(Run::Cluster(_))), "{}: nothing printed this", block.place);
        }
    }
}

#[test]
fn the_commands_for_one_machine() {
    let mut ran = 0;
    for page in PAGES {
        let mut shell = Shell::new(&[], &[]);
        for block in blocks(page) {
            match &block.run {
                Run::Local => {
                    let printed = shell.run(&block);
                    assert!(!printed.trim().is_empty(), "{}: prints nothing", block.place);
                }
                Run::Alone => {
                    shell.end_servers();
                    let printed = shell.run(&block);
                    assert_eq!(printed, format!("{}\n", golden::pod().greedy_text), "{}", block.place);
                }
                Run::Server => {
                    shell.end_servers();
                    let commands = block.commands();
                    assert_eq!(commands.len(), 1, "{}: one command that goes on", block.place);
                    shell.serve(&block.place, &commands[0], "ready");
                }
                Run::Cluster(_) | Run::Output | Run::Spec | Run::No(_) => continue,
            }
            ran += 1;
        }
    }
    assert!(ran >= 5, "{ran} blocks");
}

/// Each part of a spec on the page, put into the sample, is one that the operator would take.
#[test]
fn the_specs_are_admitted() {
    let mut seen = 0;
    for page in PAGES {
        for block in blocks(page).iter().filter(|block| block.run == Run::Spec) {
            let shell = Shell::new(&[], &[]);
            let sample = std::fs::read_to_string(shell.folder().join("model.yaml")).expect("the sample");
            let mut model: serde_json::Value = serde_saphyr::from_str(&sample).expect("the sample is YAML");
            let part: serde_json::Value = serde_saphyr::from_str(&block.text).expect("YAML");
            merge(&mut model, part);
            std::fs::write(shell.folder().join("changed.json"), model.to_string()).expect("a file");
            let plan = Block { text: "cadre operator plan -f changed.json".into(), ..block.clone() };
            let mut shell = shell;
            shell.run(&plan);
            seen += 1;
        }
    }
    assert!(seen > 0, "no page shows a part of a spec");
}

/// Objects are merged, everything else is replaced.
fn merge(into: &mut serde_json::Value, part: serde_json::Value) {
    match (into, part) {
        (serde_json::Value::Object(into), serde_json::Value::Object(part)) => {
            for (key, value) in part {
                merge(into.entry(key).or_insert(serde_json::Value::Null), value);
            }
        }
        (into, part) => *into = part,
    }
}
