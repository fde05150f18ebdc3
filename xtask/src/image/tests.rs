use std::{collections::BTreeMap, io::Read};

use serde_json::Value;
use sha2::{Digest, Sha256};

use super::*;

/// The files of a tar with their modes, in order; asserts that nothing of this machine is in a header.
fn unpack(bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
    let mut archive = tar::Archive::new(bytes);
    let entries = archive.entries().expect("a tar");
    entries
        .map(|entry| {
            let mut entry = entry.expect("an entry");
            let header = entry.header();
            assert_eq!(header.mtime().expect("a time"), 0);
            assert_eq!((header.uid().expect("an owner"), header.gid().expect("a group")), (0, 0));
            let mode = header.mode().expect("a mode");
            let path = entry.path().expect("a path").to_string_lossy().into_owned();
            let mut content = Vec::new();
            entry.read_to_end(&mut content).expect("the content");
            (path, mode, content)
        })
        .collect()
}

fn archive() -> Vec<u8> {
    let root = command::root().expect("the repository");
    let image = contents(&root, Variant::Cpu, Vec::new(), b"an executable".to_vec()).expect("the contents");
    let mut bytes = Vec::new();
    image.write(&mut bytes).expect("the archive");
    bytes
}

#[test]
fn the_same_inputs_give_the_same_bytes() {
    assert_eq!(Sha256::digest(archive()), Sha256::digest(archive()));
}

/// Follows index → manifest → configuration and layers as a runtime does, checking every digest and size.
#[test]
fn the_layout_holds_what_it_says() {
    let files: BTreeMap<String, Vec<u8>> =
        unpack(&archive()).into_iter().map(|(path, _, content)| (path, content)).collect();
    let blob = |descriptor: &Value| -> &Vec<u8> {
        let digest = descriptor["digest"].as_str().expect("a digest").trim_start_matches("sha256:");
        let bytes = &files[&format!("blobs/sha256/{digest}")];
        assert_eq!(oci::hex(&Sha256::digest(bytes)), digest);
        assert_eq!(descriptor["size"], bytes.len());
        bytes
    };
    let parse = |bytes: &[u8]| -> Value { serde_json::from_slice(bytes).expect("JSON") };
    assert_eq!(parse(&files["oci-layout"])["imageLayoutVersion"], "1.0.0");
    let index = parse(&files["index.json"]);
    let named = &index["manifests"][0];
    assert_eq!(named["annotations"]["org.opencontainers.image.ref.name"], REFERENCE);
    assert_eq!(named["annotations"]["io.containerd.image.name"], REFERENCE);
    let manifest = parse(blob(named));
    let config = parse(blob(&manifest["config"]));
    assert_eq!(config["config"]["User"], "65532:65532");
    assert_eq!(config["config"]["Entrypoint"], serde_json::json!(["/cadre"]));
    assert_eq!(config["config"]["Labels"]["org.opencontainers.image.version"], env!("CARGO_PKG_VERSION"));
    assert!(config.get("created").is_none(), "a time would differ from build to build");

    let layers = manifest["layers"].as_array().expect("layers");
    assert_eq!(layers.len(), 2);
    for (layer, diff_id) in layers.iter().zip(config["rootfs"]["diff_ids"].as_array().expect("ids")) {
        assert_eq!(&layer["digest"], diff_id);
    }
    let base = unpack(blob(&layers[0]));
    let paths: Vec<&str> = base.iter().map(|(path, ..)| path.as_str()).collect();
    assert_eq!(
        paths,
        [
            "LICENSE",
            "etc/",
            "etc/group",
            "etc/nsswitch.conf",
            "etc/passwd",
            "models/",
            "models/pocket/",
            "models/pocket/config.json",
            "models/pocket/generation_config.json",
            "models/pocket/model-00001-of-000002.safetensors",
            "models/pocket/model-00002-of-000002.safetensors",
            "models/pocket/model.safetensors.index.json",
            "models/pocket/tokenizer.json",
            "models/pocket/tokenizer_config.json",
            "tmp/",
        ]
    );
    assert_eq!(base.last().expect("tmp").1, 0o1777);
    let program = unpack(blob(&layers[1]));
    assert_eq!(program, [("cadre".to_owned(), 0o755, b"an executable".to_vec())]);

    let docker = parse(&files["manifest.json"]);
    assert_eq!(docker[0]["RepoTags"][0], REFERENCE);
    for path in docker[0]["Layers"].as_array().expect("layers").iter().chain([&docker[0]["Config"]]) {
        assert!(files.contains_key(path.as_str().expect("a path")), "{path} is not in the archive");
    }
}

#[test]
fn another_binary_leaves_the_checkpoint_layer_alone() {
    let root = command::root().expect("the repository");
    let layers = |binary: &[u8]| -> Vec<Value> {
        let mut bytes = Vec::new();
        contents(&root, Variant::Cpu, Vec::new(), binary.to_vec())
            .expect("the contents")
            .write(&mut bytes)
            .expect("the archive");
        let files = unpack(&bytes);
        let docker = files.iter().find(|(path, ..)| path == "manifest.json").expect("docker's manifest");
        let docker: Value = serde_json::from_slice(&docker.2).expect("JSON");
        docker[0]["Layers"].as_array().expect("layers").clone()
    };
    let (one, two) = (layers(b"one"), layers(b"two"));
    assert_eq!(one[0], two[0]);
    assert_ne!(one[1], two[1]);
}

#[test]
fn a_checkpoint_that_names_files_elsewhere_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let write =
        |text: &str| fs::write(folder.path().join("model.safetensors.index.json"), text).expect("a file");
    write(r#"{"weight_map": {"a": "../../etc/shadow"}}"#);
    let error = checkpoint_files(folder.path()).expect_err("a path out of the folder");
    assert!(error.to_string().contains("shadow"), "{error}");
    write(r#"{"weight_map": {}}"#);
    checkpoint_files(folder.path()).expect_err("no tensor file");
}

/// The Containerfile is the same image for people with podman or docker.
#[test]
fn the_containerfile_says_the_same() {
    let root = command::root().expect("the repository");
    let text = fs::read_to_string(root.join("deploy/Containerfile")).expect("deploy/Containerfile");
    // Continued lines are one instruction.
    let text = text.replace("\\\n", " ");
    let last = text.rsplit_once("\nFROM ").expect("stages").1;
    assert!(last.starts_with("scratch\n"), "the last stage starts from nothing");
    let has =
        |line: &str| assert!(last.lines().any(|found| found.trim() == line), "no line {line:?} in:\n{last}");
    has(&format!("USER {USER}"));
    has(&format!("ENTRYPOINT [\"{ENTRYPOINT}\"]"));
    has("WORKDIR /");
    let words: BTreeSet<&str> = text.split_whitespace().collect();
    for name in CHECKPOINT_FILES {
        assert!(words.contains(format!("{MODEL}/{name}").as_str()), "{name} is not copied");
    }
    assert!(words.contains("models/pocket/*.safetensors"), "the tensors are not copied");
    for file in [PASSWD, GROUP, NSSWITCH] {
        for line in file.lines() {
            assert!(text.contains(line), "no {line:?}");
        }
    }
    for (label, value) in LABELS {
        let value = if label.ends_with(".version") { "${VERSION}" } else { value };
        assert!(last.contains(&format!("{label}=\"{value}\"")), "no label {label} of {value:?}");
    }
    assert!(text.contains(&format!("ARG VERSION={}\n", env!("CARGO_PKG_VERSION"))), "another version");
    assert!(
        text.contains("target-feature=+crt-static"),
        "a dynamic binary would not start in an empty image"
    );
}
