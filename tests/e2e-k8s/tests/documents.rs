//! What our pages tell a reader to type on a cluster, typed there: from an empty cluster to nothing again.
//!
//! Only on a cluster of ours: the last block of docs/operations.md deletes every model of the cluster.

use std::path::Path;

use cadre_e2e::document::{self, Shell};
use cadre_e2e_k8s::{Kubectl, Namespace, cluster, operator, scripts::Scripts};

/// Namespaces that the pages make.
const NAMESPACES: [&str; 5] = ["cadre-system", "models", "team-a-system", "team-a", "team-a-test"];
/// Releases that the pages make, and where.
const RELEASES: [(&str, &str); 3] =
    [("cadre", "team-a-system"), ("cadre", "cadre-system"), ("cadre-crds", "cadre-system")];
const DEFINITIONS: [&str; 2] = ["moemodels.cadre.dev", "moetiers.cadre.dev"];

/// A cluster without anything of cadre's, before and after.
struct Empty;

impl Empty {
    fn cluster() -> Self {
        // The other suites' operator; they install it again.
        let _ =
            cluster().helm(&["uninstall", operator::RELEASE, "--namespace", operator::NAMESPACE, "--wait"]);
        let _ = cluster().helm(&["uninstall", operator::CRDS, "--namespace", operator::NAMESPACE, "--wait"]);
        if let Err(error) = clear() {
            panic!("the cluster cannot be emptied: {error}");
        }
        Self
    }
}

impl Drop for Empty {
    fn drop(&mut self) {
        match clear() {
            Ok(()) => {}
            Err(error) if std::thread::panicking() => eprintln!("{error}"),
            Err(error) => panic!("the pages left something behind that cannot be removed: {error}"),
        }
    }
}

fn clear() -> Result<(), String> {
    let kubectl = Kubectl::cluster_wide();
    let run = |args: &[&str]| kubectl.run(args).map(drop).map_err(|error| error.to_string());
    for (release, namespace) in RELEASES {
        let gone = ["uninstall", release, "--namespace", namespace, "--ignore-not-found", "--wait"];
        cluster().helm(&gone).map_err(|error| error.to_string())?;
    }
    run(&[&["delete", "crd", "--ignore-not-found", "--timeout=120s"], &DEFINITIONS[..]].concat())?;
    run(&[&["delete", "namespace", "--ignore-not-found", "--timeout=120s"], &NAMESPACES[..]].concat())
}

/// Runs every block of a page that is for a cluster.
fn follow(page: &str, scripts: &Scripts, kubeconfig: &Path) {
    let blocks = document::read(page).unwrap_or_else(|faults| panic!("{faults}"));
    let on_cluster = document::on_cluster(&blocks);
    assert!(on_cluster.len() >= 2, "{page}: {} blocks for a cluster", on_cluster.len());
    let (kubectl, helm) = (cluster().kubectl_program(), cluster().helm_program());
    let variables = [("KUBECONFIG", kubeconfig), ("CADRE_CLUSTER_DIR", scripts.folder())];
    let mut shell = Shell::new(&[("kubectl", kubectl), ("helm", helm)], &variables);
    for (block, output) in on_cluster {
        #[allow(clippy::print_stdout, reason = "a log of the suite: how far the page went")]
        {
            println!("{}", block.place);
        }
        let printed = shell.run(block);
        if let Some(output) = output {
            output.assert_printed(&printed);
        }
    }
}

#[test]
fn operations_from_an_empty_cluster_to_nothing() {
    let Some(scripts) = cluster().scripts_or_notice("docs/operations.md as it is typed") else { return };
    let _empty = Empty::cluster();
    follow("docs/operations.md", scripts, cluster().kubeconfig());
}

#[test]
fn readme_quick_start() {
    let Some(scripts) = cluster().scripts_or_notice("README.md as it is typed") else { return };
    let _empty = Empty::cluster();
    // The reader's current namespace, one that can be thrown away.
    let namespace = Namespace::new("readme");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let kubeconfig = folder.path().join("kubeconfig");
    std::fs::copy(cluster().kubeconfig(), &kubeconfig).expect("a copy");
    let config = format!("--kubeconfig={}", kubeconfig.display());
    let current = ["config", "set-context", "--current", "--namespace", namespace.name(), &config];
    Kubectl::cluster_wide().must(&current);
    follow("README.md", scripts, &kubeconfig);
}
