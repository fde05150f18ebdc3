//! Source files that no module declares: they are compiled by nobody and rot.
//!
//! The walk follows `mod name;` from every target root, as rustc does, and `#[path = "…"]`. It reads
//! lines, not syntax: a `mod` inside a string literal would be followed in vain, which is harmless, and a
//! `mod` made by a macro would be missed, which this repository does not do.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use crate::metadata::Package;

/// Every `.rs` file of a package outside `target`, sorted.
pub(crate) fn rust_files(package: &Package) -> Result<Vec<PathBuf>> {
    let root = package.manifest_path.parent().context("a manifest has a folder")?;
    let mut files = Vec::new();
    let mut open = vec![root.to_path_buf()];
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(&folder).with_context(|| format!("list {}", folder.display()))? {
            let path = entry?.path();
            // A package below this one (tests/e2e under the root, say) answers for itself.
            if path.is_dir()
                && path.file_name() != Some("target".as_ref())
                && !path.join("Cargo.toml").is_file()
            {
                open.push(path);
            } else if path.extension() == Some("rs".as_ref()) {
                files.push(path);
            }
        }
    }
    files.sort();
    Ok(files)
}

/// One line per file that no target reaches.
pub(crate) fn undeclared(package: &Package) -> Result<Vec<String>> {
    let mut reached = BTreeSet::new();
    for target in &package.targets {
        follow(&target.src_path, true, &mut reached)?;
    }
    Ok(rust_files(package)?
        .into_iter()
        .filter(|file| !reached.contains(file))
        .map(|file| format!("{} is declared by no module and therefore never compiled", file.display()))
        .collect())
}

/// Adds a file and everything that it declares.
fn follow(file: &Path, is_root: bool, reached: &mut BTreeSet<PathBuf>) -> Result<()> {
    if !file.is_file() || !reached.insert(file.to_path_buf()) {
        return Ok(());
    }
    let text = fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
    let folder = file.parent().context("a file has a folder")?;
    let children =
        if is_root { folder.to_path_buf() } else { folder.join(file.file_stem().unwrap_or_default()) };
    let mut path_attribute: Option<PathBuf> = None;
    for line in text.lines().map(str::trim) {
        if let Some(path) = line.strip_prefix("#[path = \"").and_then(|rest| rest.strip_suffix("\"]")) {
            path_attribute = Some(folder.join(path));
        } else if let Some(include) = line.strip_prefix("include!(\"").and_then(|rest| rest.split('"').next())
        {
            reached.insert(folder.join(include));
        } else if let Some(name) = declared_module(line) {
            match path_attribute.take() {
                Some(path) => follow(&path, false, reached)?,
                None => {
                    follow(&children.join(format!("{name}.rs")), false, reached)?;
                    // Only below `tests/`, where a plain file would be a test target of its own.
                    follow(&children.join(name).join("mod.rs"), true, reached)?;
                }
            }
        }
    }
    Ok(())
}

/// The name in `mod name;`, whatever its visibility.
fn declared_module(line: &str) -> Option<&str> {
    let rest = line.strip_suffix(';')?;
    let (visibility, name) = rest.rsplit_once("mod ")?;
    let is_visibility = visibility.is_empty() || visibility == "pub " || visibility.starts_with("pub(");
    let is_name = !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    (is_visibility && is_name).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metadata::Target;

    #[test]
    fn finds_the_orphan_and_only_the_orphan() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let root = folder.path();
        fs::create_dir_all(root.join("src/router")).expect("folders");
        let files = [
            ("src/lib.rs", "pub mod router;\npub(crate) mod wire;\nmod inline { }\n"),
            ("src/router.rs", "#[cfg(test)]\nmod tests;\n"),
            ("src/router/tests.rs", ""),
            ("src/wire.rs", "// mod forgotten;\n"),
            ("src/router/forgotten.rs", ""),
        ];
        for (name, text) in files {
            fs::write(root.join(name), text).expect("a source file");
        }
        let package = Package {
            id: "p".into(),
            name: "p".into(),
            manifest_path: root.join("Cargo.toml"),
            targets: vec![Target {
                name: "p".into(),
                kind: vec!["lib".into()],
                src_path: root.join("src/lib.rs"),
                test: true,
            }],
            dependencies: Vec::new(),
        };
        let faults = undeclared(&package).expect("the walk");
        assert_eq!(faults.len(), 1, "{faults:?}");
        assert!(faults[0].contains("router/forgotten.rs"), "{faults:?}");
    }

    #[test]
    fn reads_declarations_as_rustc_does() {
        assert_eq!(declared_module("mod a;"), Some("a"));
        assert_eq!(declared_module("pub(crate) mod b_2;"), Some("b_2"));
        assert_eq!(declared_module("// mod c;"), None);
        assert_eq!(declared_module("mod d {"), None);
        assert_eq!(declared_module("let mod_e = 1;"), None);
    }
}
