use std::path::PathBuf;

use super::*;
use crate::metadata::Dependency;

fn package(name: &str, deps: &[(&str, Option<&str>)]) -> Package {
    Package {
        id: name.into(),
        name: name.into(),
        manifest_path: PathBuf::new(),
        targets: Vec::new(),
        dependencies: deps
            .iter()
            .map(|(to, kind)| Dependency {
                name: (*to).into(),
                kind: kind.map(Into::into),
                path: Some(PathBuf::new()),
            })
            .collect(),
    }
}

/// The faults of one package among an otherwise faultless workspace.
fn faults_of(tested: &Package) -> Vec<String> {
    let others: Vec<Package> = LAYERS
        .iter()
        .flat_map(|names| names.iter())
        .chain(&TOOLS)
        .filter(|name| **name != tested.name)
        .map(|name| package(name, &[]))
        .collect();
    edges(&others.iter().chain([tested]).collect::<Vec<_>>())
}

#[test]
fn an_arrow_down_is_allowed() {
    assert_eq!(faults_of(&package("cadre-worker", &[("cadre-engine", None)])), Vec::<String>::new());
}

#[test]
fn an_arrow_up_or_across_is_named() {
    let up = faults_of(&package("cadre-types", &[("cadre-worker", None)]));
    assert_eq!(up, ["cadre-types (L0) has a normal dependency on cadre-worker (L4)"]);
    let across = faults_of(&package("cadre-router", &[("cadre-worker", None)]));
    assert_eq!(across, ["cadre-router (L4) has a normal dependency on cadre-worker (L4)"]);
}

#[test]
fn a_dev_dependency_reaches_its_own_layer_only() {
    assert_eq!(faults_of(&package("cadre-model", &[("cadre-ops-cpu", Some("dev"))])), Vec::<String>::new());
    let up = faults_of(&package("cadre-model", &[("cadre-engine", Some("dev"))]));
    assert_eq!(up, ["cadre-model (L2) has a dev dependency on cadre-engine (L3)"]);
}

#[test]
fn a_crate_in_no_layer_is_named() {
    let faults = faults_of(&package("cadre-utils", &[]));
    assert_eq!(faults, ["cadre-utils is in no layer: add it to LAYERS"]);
}

#[test]
fn architecture_md_has_the_same_table() {
    let root = command::root().expect("the repository root");
    let page = fs::read_to_string(root.join("ARCHITECTURE.md")).expect("ARCHITECTURE.md");
    for (layer, names) in LAYERS.iter().enumerate() {
        for name in *names {
            let short = name.strip_prefix("cadre-").unwrap_or(name);
            let row = format!("| L{layer} | `{short}` |");
            assert!(page.contains(&row), "ARCHITECTURE.md has no row that begins with {row:?}");
        }
    }
}
