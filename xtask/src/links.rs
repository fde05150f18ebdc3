//! Pages that are referred to and do not exist: `[text](path)` in Markdown, and `docs/….md` anywhere.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

/// Folders that hold pages or sources of ours.
const FOLDERS: [&str; 6] = ["crates", "docs", "proto", "tests/e2e", "tests/e2e-k8s", "tests/cluster"];

/// One line per reference to a page that does not exist.
pub(crate) fn dead(root: &Path) -> Result<Vec<String>> {
    let mut files: Vec<PathBuf> = list(root, false)?;
    for folder in FOLDERS {
        files.extend(list(&root.join(folder), true)?);
    }
    let mut faults = Vec::new();
    for file in files {
        let text = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
        let folder = file.parent().unwrap_or(root);
        let links = if file.extension() == Some("md".as_ref()) { links(&text) } else { Vec::new() };
        let targets = links
            .into_iter()
            .map(|link| (link.to_owned(), folder.join(link)))
            .chain(mentions(&text).into_iter().map(|page| (page.to_owned(), root.join(page))));
        for (named, _) in targets.filter(|(_, path)| !path.exists()) {
            faults.push(format!("{} refers to {named}, which does not exist", file.display()));
        }
    }
    faults.sort();
    faults.dedup();
    Ok(faults)
}

/// Markdown, Rust and proto files of a folder.
fn list(folder: &Path, deep: bool) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))? {
        let path = entry?.path();
        let is_ours = path.extension().is_some_and(|kind| kind == "md" || kind == "rs" || kind == "proto");
        if path.is_dir() && deep {
            files.extend(list(&path, true)?);
        } else if path.is_file() && is_ours {
            files.push(path);
        }
    }
    Ok(files)
}

/// Relative targets of `[text](target)`, without fragments. What stands in a code span (a pattern, say) is no link.
fn links(text: &str) -> Vec<&str> {
    text.lines()
        .flat_map(|line| line.split('`').step_by(2))
        .flat_map(|prose| prose.split("](").skip(1))
        .filter_map(|rest| rest.split(')').next())
        .filter_map(|target| target.split('#').next())
        .filter(|target| {
            !target.is_empty() && !target.contains("://") && !target.contains(char::is_whitespace)
        })
        .collect()
}

/// `docs/….md` as a word.
fn mentions(text: &str) -> Vec<&str> {
    let is_path = |c: char| c.is_ascii_alphanumeric() || matches!(c, '/' | '-' | '_' | '.');
    text.split(|c: char| !is_path(c))
        .map(|word| word.trim_end_matches('.'))
        .filter(|word| word.starts_with("docs/") && word.ends_with(".md") && !word.contains(".."))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_what_is_not_there() {
        let root = tempfile::tempdir().expect("a temporary folder");
        for folder in FOLDERS {
            fs::create_dir_all(root.path().join(folder)).expect("a folder");
        }
        let write = |file: &str, text: &str| fs::write(root.path().join(file), text).expect("a file");
        write(
            "README.md",
            "[a](docs/here.md#part) [b](docs/gone.md) [c](https://example.org) see docs/lost.md.",
        );
        write("docs/here.md", "[up](../README.md) and [`beside`](beside.md), the pattern `[a-z]([a-z0-9]*)`");
        write("crates/lib.rs", "//! docs/here.md, docs/missing.md");
        let faults = dead(root.path()).expect("the walk");
        let named: Vec<&str> =
            faults.iter().filter_map(|fault| fault.split("refers to ").nth(1)?.split(',').next()).collect();
        let mut named = named;
        named.sort_unstable();
        assert_eq!(named, ["beside.md", "docs/gone.md", "docs/lost.md", "docs/missing.md"]);
    }
}
