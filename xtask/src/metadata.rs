//! What cargo says about the workspace, cut down to what the tasks ask.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
};

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::command;

/// `cargo metadata`, the fields that we read.
#[derive(Debug, Deserialize)]
pub(crate) struct Metadata {
    pub(crate) packages: Vec<Package>,
    workspace_members: BTreeSet<String>,
    resolve: Option<Resolve>,
    pub(crate) target_directory: PathBuf,
}

/// One package, ours or not.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Package {
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) manifest_path: PathBuf,
    pub(crate) targets: Vec<Target>,
    pub(crate) dependencies: Vec<Dependency>,
}

/// A library, binary, test, bench or example.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Target {
    pub(crate) name: String,
    pub(crate) kind: Vec<String>,
    pub(crate) src_path: PathBuf,
    pub(crate) test: bool,
}

/// A line of a `[dependencies]` table.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Dependency {
    pub(crate) name: String,
    /// `None` for a normal dependency, else `dev` or `build`.
    pub(crate) kind: Option<String>,
    /// Set for crates of this repository.
    pub(crate) path: Option<PathBuf>,
}

#[derive(Debug, Deserialize)]
struct Resolve {
    nodes: Vec<Node>,
}

#[derive(Debug, Deserialize)]
struct Node {
    id: String,
    deps: Vec<NodeDep>,
}

#[derive(Debug, Deserialize)]
struct NodeDep {
    pkg: String,
    dep_kinds: Vec<DepKind>,
}

#[derive(Debug, Deserialize)]
struct DepKind {
    kind: Option<String>,
}

impl Metadata {
    /// Asks cargo, with the resolved graph.
    pub(crate) fn load() -> Result<Self> {
        let text = command::capture(command::cargo().args(["metadata", "--format-version", "1"]))?;
        serde_json::from_slice(&text).context("read the output of cargo metadata")
    }

    /// The packages of this workspace.
    pub(crate) fn members(&self) -> impl Iterator<Item = &Package> {
        self.packages.iter().filter(|package| self.workspace_members.contains(&package.id))
    }

    /// Names of all packages that each package reaches over normal dependencies, by package name.
    pub(crate) fn normal_closure(&self, of: &Package) -> BTreeSet<String> {
        let names: BTreeMap<&str, &str> =
            self.packages.iter().map(|package| (package.id.as_str(), package.name.as_str())).collect();
        let nodes: BTreeMap<&str, &Node> = self
            .resolve
            .iter()
            .flat_map(|resolve| &resolve.nodes)
            .map(|node| (node.id.as_str(), node))
            .collect();
        let mut reached = BTreeSet::new();
        let mut open = vec![of.id.as_str()];
        while let Some(id) = open.pop() {
            let deps = nodes.get(id).into_iter().flat_map(|node| &node.deps);
            for dep in deps.filter(|dep| dep.dep_kinds.iter().any(|kind| kind.kind.is_none())) {
                if reached.insert(dep.pkg.as_str()) {
                    open.push(&dep.pkg);
                }
            }
        }
        reached.into_iter().filter_map(|id| names.get(id).map(ToString::to_string)).collect()
    }
}
