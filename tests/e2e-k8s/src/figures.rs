//! Measured numbers, as rows of Markdown tables.
//!
//! Each table is a file `target/xtask/k8s-figures/NAME.md`; a row replaces the row of the same first cell, so that a
//! test that runs again refreshes its own. `cargo xtask figures` puts the tables into docs/kubernetes-figures.md.

use std::{
    fs,
    path::PathBuf,
    process::Command,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use crate::{command, diagnosis::output_folder, kubectl::Kubectl};

/// A table of figures.
#[derive(Debug)]
pub struct Figures {
    path: PathBuf,
    head: String,
}

impl Figures {
    /// The table `name` with these columns.
    pub fn new(name: &str, columns: &[&str]) -> Self {
        let rule = columns.iter().map(|_| "---").collect::<Vec<_>>().join(" | ");
        let head = format!("| {} |\n| {rule} |\n", columns.join(" | "));
        Self { path: output_folder().join("k8s-figures").join(format!("{name}.md")), head }
    }

    /// Writes a row. Figures are a by-product: a disk that is full fails no test.
    pub fn row(&self, key: &str, cells: &[String]) {
        let row = format!("| {key} | {} |", cells.join(" | "));
        eprintln!("figure: {row}");
        // Tests of one suite may run at the same time.
        static WRITING: Mutex<()> = Mutex::new(());
        let _writing = WRITING.lock().unwrap_or_else(PoisonError::into_inner);
        let known = fs::read_to_string(&self.path).unwrap_or_default();
        let folder = self.path.parent().map(fs::create_dir_all).transpose();
        if let Err(error) = folder.and_then(|_| fs::write(&self.path, merged(&known, &self.head, key, &row)))
        {
            eprintln!("{}: {error}", self.path.display());
        }
    }
}

/// The table with the row in its place. A table of other columns is begun anew.
fn merged(known: &str, head: &str, key: &str, row: &str) -> String {
    let mut rows: Vec<&str> = known.strip_prefix(head).unwrap_or_default().lines().collect();
    match rows.iter_mut().find(|known| known.starts_with(&format!("| {key} |"))) {
        Some(known) => *known = row,
        None => rows.push(row),
    }
    format!("{head}{}\n", rows.join("\n"))
}

/// A duration as a cell.
pub fn seconds(time: Duration) -> String {
    format!("{:.1}", time.as_secs_f64())
}

/// Writes on which cluster and machine, and of which commit, the figures are.
pub fn describe_run() {
    let said = |program: &str, args: &[&str]| {
        let output = command::run(Command::new(program).args(args), None, Duration::from_secs(20));
        output.map(|text| text.trim().to_owned()).unwrap_or_else(|_| "unknown".into())
    };
    let processor = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = processor.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let kubectl = Kubectl::cluster_wide();
    let jsonpath = "jsonpath={range .items[*]}{.status.nodeInfo.kubeletVersion} {end}";
    let nodes = kubectl.run(&["get", "nodes", "--output", jsonpath]).unwrap_or_default();
    let figures = Figures::new("run", &["of", "what"]);
    for (key, value) in [
        ("machine", format!("{cores} cores, {}", model.map_or("unknown processor", |(_, name)| name))),
        ("cluster", format!("nodes of Kubernetes {}", nodes.trim().replace(' ', ", "))),
        ("commit", said("git", &["rev-parse", "--short=9", "HEAD"])),
        ("date", said("date", &["--utc", "+%Y-%m-%d"])),
    ] {
        figures.row(key, &[value]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "| a | b |\n| --- | --- |\n";

    #[test]
    fn a_row_replaces_its_own_and_no_other() {
        let one = merged("", HEAD, "x", "| x | 1 |");
        assert_eq!(one, format!("{HEAD}| x | 1 |\n"));
        let two = merged(&one, HEAD, "xy", "| xy | 2 |");
        let three = merged(&two, HEAD, "x", "| x | 3 |");
        assert_eq!(three, format!("{HEAD}| x | 3 |\n| xy | 2 |\n"));
        assert_eq!(merged(&three, "| c |\n| --- |\n", "z", "| z |"), "| c |\n| --- |\n| z |\n");
    }
}
