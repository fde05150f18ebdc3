//! What explains a failed test: the short form for its output, everything else for a file.

use std::{
    fs,
    path::{Path, PathBuf},
};

use cadre_k8s_api::MoEModel;

use crate::{kubectl::Kubectl, operator};

/// Lines of a log that are shown; its end tells most.
const TAIL: &str = "--tail=40";

/// Tells what is in a namespace, on standard error; never fails.
pub fn tell(namespace: &str) {
    let kubectl = Kubectl::of(namespace);
    let show = |args: &[&str]| kubectl.run(args).unwrap_or_else(|error| error.to_string());
    eprintln!("--- namespace {namespace}");
    eprintln!("{}", conditions(&kubectl));
    eprintln!("{}", show(&["get", "moetiers,pods", "--output=wide"]));
    let events = show(&["get", "events", "--sort-by=.metadata.creationTimestamp", "--no-headers"]);
    let events: Vec<&str> = events.lines().collect();
    eprintln!("events:\n{}", events[events.len().saturating_sub(30)..].join("\n"));
    eprintln!("operator:\n{}", operator_log(TAIL));
    match write(namespace, &show) {
        Ok(path) => eprintln!("--- objects and logs: {}", path.display()),
        Err(error) => eprintln!("--- objects and logs are not kept: {error}"),
    }
}

/// The conditions of every model, a line each.
pub fn conditions(kubectl: &Kubectl) -> String {
    match kubectl.list::<MoEModel>(&["moemodels"]) {
        Ok(models) => models.iter().map(of_model).collect::<Vec<_>>().join("\n"),
        Err(error) => error,
    }
}

/// The conditions of a model.
pub fn of_model(model: &MoEModel) -> String {
    let name = model.metadata.name.as_deref().unwrap_or_default();
    let generation = model.metadata.generation.unwrap_or_default();
    let Some(status) = &model.status else { return format!("{name}: no status yet") };
    let observed = status.observed_generation.unwrap_or_default();
    let lines = status.conditions.iter().map(|condition| {
        format!("  {} {} {}: {}", condition.type_, condition.status, condition.reason, condition.message)
    });
    let tiers = [&status.prefill, &status.decode, &status.experts]
        .map(|tier| tier.as_ref().map_or("-".to_owned(), |tier| tier.summary.clone()))
        .join(" ");
    let head =
        format!("{name}: generation {generation}, observed {observed}; prefill, decode, experts {tiers}");
    std::iter::once(head).chain(lines).collect::<Vec<_>>().join("\n")
}

fn operator_log(tail: &str) -> String {
    let kubectl = Kubectl::of(operator::NAMESPACE);
    let args = ["logs", "--selector", operator::SELECTOR, "--all-containers", "--prefix", tail];
    kubectl.run(&args).unwrap_or_else(|error| error.to_string())
}

fn write(namespace: &str, show: &dyn Fn(&[&str]) -> String) -> std::io::Result<PathBuf> {
    let folder = output_folder().join("logs/k8s");
    fs::create_dir_all(&folder)?;
    let path = folder.join(format!("{namespace}.txt"));
    let objects =
        "moemodels,moetiers,deployments,replicasets,statefulsets,services,configmaps,pods,endpointslices";
    let mut text = show(&["get", objects, "--output=yaml"]);
    text.push_str(&show(&["describe", "pods"]));
    for pod in show(&["get", "pods", "--output=name"]).lines() {
        text.push_str(&format!("\n--- log of {pod}\n{}", show(&["logs", pod, "--tail=400"])));
        text.push_str(&format!("\n--- before: {}", show(&["logs", pod, "--previous", "--tail=400"])));
    }
    text.push_str(&format!("\n--- operator\n{}", operator_log("--tail=4000")));
    fs::write(&path, text)?;
    Ok(path)
}

/// `target/xtask`, found from the program that runs: `target/PROFILE/deps/NAME`. Cargo's mark may be missing in a folder
/// that was copied; then it is the workspace's own.
pub(crate) fn output_folder() -> PathBuf {
    let program = std::env::current_exe().unwrap_or_default();
    let target = program.ancestors().find(|folder| folder.join("CACHEDIR.TAG").is_file());
    let own = || Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../target"));
    target.unwrap_or_else(own).join("xtask")
}
