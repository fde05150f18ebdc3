//! The architecture as a table, and the check that the crates still follow it.
//!
//! Every normal dependency between our crates must point to a strictly lower layer, or be one of the
//! [`SAME_LAYER`] edges, each with its reason. Dev-dependencies may reach their own layer, never above it.
//! Pure crates reach no async runtime, no gRPC and no Kubernetes, however indirectly. A crate that is in no
//! row fails the check: decide where a new crate belongs before it is used.

use std::{collections::BTreeMap, fs};

use anyhow::{Result, ensure};

use crate::{
    command, links,
    metadata::{Metadata, Package},
    modules,
};

/// Layers from the bottom. ARCHITECTURE.md shows the same table; a test compares them.
pub(crate) const LAYERS: [&[&str]; 6] = [
    &["cadre-numerics", "cadre-mapping", "cadre-net", "cadre-types"],
    &[
        "cadre-proto",
        "cadre-placement",
        "cadre-scheduler",
        "cadre-sampler",
        "cadre-text",
        "cadre-telemetry",
        "cadre-checkpoint",
        "cadre-ops",
        "cadre-k8s-api",
    ],
    &["cadre-ops-cpu", "cadre-ops-cuda", "cadre-model", "cadre-dispatch"],
    &["cadre-shard", "cadre-engine", "cadre-device"],
    &["cadre-worker", "cadre-expert", "cadre-router", "cadre-operator"],
    &["cadre"],
];

/// Crates beside the layers: they may use any layer and nothing may use them.
const TOOLS: [&str; 4] = ["cadre-e2e", "cadre-e2e-k8s", "cadre-fuzz", "xtask"];

/// Allowed edges inside a layer: (from, to, reason).
const SAME_LAYER: [(&str, &str, &str); 3] = [
    ("cadre-e2e-k8s", "cadre-e2e", "the same clients, golden texts and damaged checkpoints"),
    ("cadre-worker", "cadre-expert", "a process may hold a worker and shards of its device"),
    ("cadre-ops", "cadre-sampler", "drawing a token is an operation, and every backend draws the sampler's"),
];

/// Crates that stay free of the frameworks in [`FRAMEWORKS`].
const PURE: [&str; 7] = [
    "cadre-numerics",
    "cadre-mapping",
    "cadre-types",
    "cadre-placement",
    "cadre-scheduler",
    "cadre-sampler",
    "cadre-ops",
];

const FRAMEWORKS: [&str; 7] = ["tokio", "tonic", "prost", "hyper", "axum", "kube", "cudarc"];

/// The only crates with `unsafe` code.
const UNSAFE: [&str; 3] = ["cadre-mapping", "cadre-ops-cpu", "cadre-ops-cuda"];

/// Pairs that must not be connected, however indirectly: a router plans and forwards, it never computes.
const NEVER: [(&str, &str); 4] = [
    ("cadre-router", "cadre-engine"),
    ("cadre-router", "cadre-model"),
    ("cadre-router", "cadre-ops-cpu"),
    ("cadre-router", "cadre-ops-cuda"),
];

/// Runs the check over the workspace.
pub(crate) fn run() -> Result<()> {
    let metadata = Metadata::load()?;
    let mut faults = edges(&metadata.members().collect::<Vec<_>>());
    for package in metadata.members() {
        faults.extend(reach(package, &metadata));
        faults.extend(unsafe_allowances(package)?);
        faults.extend(modules::undeclared(package)?);
    }
    faults.extend(links::dead(&command::root()?)?);
    faults.iter().for_each(|fault| eprintln!("layers: {fault}"));
    ensure!(faults.is_empty(), "{} faults (xtask/src/layers.rs has the rules)", faults.len());
    println!("layers: {} crates, every arrow points down", metadata.members().count());
    Ok(())
}

/// Direct dependencies that break the table.
fn edges(members: &[&Package]) -> Vec<String> {
    let layer_of: BTreeMap<&str, usize> = LAYERS
        .iter()
        .enumerate()
        .flat_map(|(layer, names)| names.iter().map(move |name| (*name, layer)))
        .chain(TOOLS.iter().map(|name| (*name, LAYERS.len())))
        .collect();
    let mut faults = Vec::new();
    for package in members {
        let from = package.name.as_str();
        let Some(&upper) = layer_of.get(from) else {
            faults.push(format!("{from} is in no layer: add it to LAYERS"));
            continue;
        };
        for dependency in package.dependencies.iter().filter(|dependency| dependency.path.is_some()) {
            let to = dependency.name.as_str();
            let Some(&lower) = layer_of.get(to) else { continue };
            let fits = match dependency.kind.as_deref() {
                Some("dev") => lower <= upper && !TOOLS.contains(&to),
                _ => lower < upper || SAME_LAYER.iter().any(|(a, b, _)| (*a, *b) == (from, to)),
            };
            if !fits {
                let kind = dependency.kind.as_deref().unwrap_or("normal");
                faults.push(format!("{from} (L{upper}) has a {kind} dependency on {to} (L{lower})"));
            }
        }
    }
    for name in layer_of.keys() {
        if !members.iter().any(|package| package.name == *name) {
            faults.push(format!("{name} is in the layer table but not in the workspace"));
        }
    }
    faults
}

/// Indirect dependencies that break a rule.
fn reach(package: &Package, metadata: &Metadata) -> Vec<String> {
    let name = package.name.as_str();
    let forbidden = NEVER.iter().filter(|(from, _)| *from == name).map(|(_, to)| *to);
    let frameworks = PURE.contains(&name).then_some(FRAMEWORKS).into_iter().flatten();
    let wanted: Vec<&str> = forbidden.chain(frameworks).collect();
    if wanted.is_empty() {
        return Vec::new();
    }
    let closure = metadata.normal_closure(package);
    wanted
        .into_iter()
        .filter(|to| closure.contains(*to))
        .map(|to| format!("{name} reaches {to} over normal dependencies"))
        .collect()
}

/// Crates that lift the workspace's ban of `unsafe` without being entitled to.
fn unsafe_allowances(package: &Package) -> Result<Vec<String>> {
    if UNSAFE.contains(&package.name.as_str()) || package.name == "xtask" {
        return Ok(Vec::new());
    }
    let mut faults = Vec::new();
    for file in modules::rust_files(package)? {
        let text = fs::read_to_string(&file)?;
        let lifts = text
            .lines()
            .any(|line| line.contains("unsafe_code") && (line.contains("allow") || line.contains("expect")));
        if lifts {
            faults.push(format!("{} allows unsafe code; only {UNSAFE:?} may", file.display()));
        }
    }
    if !fs::read_to_string(&package.manifest_path)?.contains("[lints]\nworkspace = true") {
        faults.push(format!("{} does not inherit the workspace's lints", package.manifest_path.display()));
    }
    Ok(faults)
}

#[cfg(test)]
mod tests;
