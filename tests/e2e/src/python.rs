//! The Python of the OpenAI client: a virtual environment of our own, made once per target folder.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use crate::binary::root;

/// The interpreter of a virtual environment below `scratch` that has python/requirements.txt installed.
pub fn interpreter(scratch: &Path) -> PathBuf {
    let requirements = root().join("tests/e2e/python/requirements.txt");
    let wanted = fs::read_to_string(&requirements).expect("requirements.txt");
    let venv = scratch.join("openai-venv");
    let python = venv.join("bin/python");
    // Written last, so that an environment that has it is complete.
    let installed = venv.join("installed-requirements.txt");
    if fs::read_to_string(&installed).is_ok_and(|have| have == wanted) {
        return python;
    }
    if venv.exists() {
        fs::remove_dir_all(&venv).expect("remove an outdated virtual environment");
    }
    run(Command::new("python3").args(["-m", "venv"]).arg(&venv));
    run(Command::new(&python)
        .args(["-m", "pip", "install", "--quiet", "--no-deps", "-r"])
        .arg(&requirements));
    fs::write(&installed, wanted).expect("mark the virtual environment as complete");
    python
}

fn run(command: &mut Command) {
    let output =
        command.output().unwrap_or_else(|error| panic!("{command:?}: {error} (Python 3.10 is needed)"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}
