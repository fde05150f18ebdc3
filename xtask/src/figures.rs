//! `cargo xtask figures`: what was measured goes into docs/kubernetes-figures.md.
//!
//! Tests and the bench leave a table per topic in `target/xtask/k8s-figures`. The page has a pair of marks for each:
//! what is between `<!-- figures: NAME -->` and `<!-- end -->` is replaced, the words around it stay.

use std::fs;

use anyhow::{Context, Result, ensure};

use crate::{command, metadata::Metadata};

const PAGE: &str = "docs/kubernetes-figures.md";
const BEGIN: &str = "<!-- figures: ";
const END: &str = "<!-- end -->";

/// Fills the page with the tables that there are.
pub(crate) fn run() -> Result<()> {
    let folder = Metadata::load()?.target_directory.join("xtask/k8s-figures");
    let path = command::root()?.join(PAGE);
    let page = fs::read_to_string(&path).with_context(|| format!("read {PAGE}"))?;
    let mut found = Vec::new();
    let filled = fill(&page, |name| {
        let table = fs::read_to_string(folder.join(format!("{name}.md"))).ok();
        found.push(format!("{name} {}", if table.is_some() { "new" } else { "as it was" }));
        table
    })?;
    fs::write(&path, filled).with_context(|| format!("write {PAGE}"))?;
    println!("{PAGE}: {}", found.join(", "));
    Ok(())
}

/// The page with every table that `table` knows.
fn fill(page: &str, mut table: impl FnMut(&str) -> Option<String>) -> Result<String> {
    let mut parts = page.split(BEGIN);
    let mut filled = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (name, rest) =
            part.split_once(" -->").with_context(|| format!("no end of a mark in {part:?}"))?;
        let (old, after) = rest.split_once(END).with_context(|| format!("no {END} after {BEGIN}{name}"))?;
        ensure!(!old.contains("\n#"), "a heading is between {BEGIN}{name} --> and {END}");
        let new = table(name).map_or_else(|| old.to_owned(), |table| format!("\n{table}"));
        filled.push_str(&format!("{BEGIN}{name} -->{new}{END}{after}"));
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_replaced_and_words_stay() {
        let page = "a\n<!-- figures: x -->\nold\n<!-- end -->\nb\n<!-- figures: y -->\nkept\n<!-- end -->\n";
        let once = fill(page, |name| (name == "x").then(|| "| new |\n".into())).expect("a page");
        assert_eq!(once, page.replace("old", "| new |"));
        assert_eq!(fill(&once, |name| (name == "x").then(|| "| new |\n".into())).expect("a page"), once);
    }

    #[test]
    fn a_mark_without_an_end_is_refused() {
        fill("<!-- figures: x -->\nold\n", |_| None).expect_err("no end");
        fill("<!-- figures: x -->\n# Heading\n<!-- end -->", |_| None).expect_err("words would be lost");
    }

    #[test]
    fn the_page_has_marks_for_every_table() {
        let page = fs::read_to_string(command::root().expect("the repository").join(PAGE)).expect(PAGE);
        let mut names = Vec::new();
        let same = fill(&page, |name| {
            names.push(name.to_owned());
            None
        });
        assert_eq!(same.expect("well-formed marks"), page);
        assert_eq!(names, ["run", "install", "scaling", "requests", "conditions", "scale"]);
    }
}
