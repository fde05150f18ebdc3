//! The samples of `deploy/samples`, and changes of them.

use std::{fs, path::PathBuf};

use cadre_e2e::binary::root;
use serde_json::{Value, json};

use crate::cluster::cluster;

/// Where the samples are.
pub fn folder() -> PathBuf {
    root().join("deploy/samples")
}

/// The pocket sample with the image under test.
pub fn pocket() -> Value {
    patched(plain_pocket(), &json!({"spec": {"image": cluster().image()}}))
}

/// The pocket sample as it is in the repository.
pub fn plain_pocket() -> Value {
    let text = fs::read_to_string(folder().join("pocket.yaml")).expect("deploy/samples/pocket.yaml");
    serde_saphyr::from_str(&text).expect("one YAML document")
}

/// JSON merge patch (RFC 7396).
pub fn patched(mut object: Value, patch: &Value) -> Value {
    let Some(changes) = patch.as_object() else { return patch.clone() };
    if !object.is_object() {
        object = json!({});
    }
    let fields = object.as_object_mut().expect("just made one");
    for (key, change) in changes {
        if change.is_null() {
            fields.remove(key);
        } else {
            let inner = fields.remove(key).unwrap_or_default();
            fields.insert(key.clone(), patched(inner, change));
        }
    }
    object
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_patch_sets_removes_and_replaces() {
        let object = json!({"spec": {"a": 1, "b": {"c": 2, "d": 3}}});
        let patch = json!({"spec": {"a": null, "b": {"c": {"e": [1]}}, "f": "g"}});
        assert_eq!(patched(object, &patch), json!({"spec": {"b": {"d": 3, "c": {"e": [1]}}, "f": "g"}}));
    }

    #[test]
    fn the_pocket_sample_is_one_model() {
        let sample = plain_pocket();
        assert_eq!((&sample["kind"], &sample["metadata"]["name"]), (&json!("MoEModel"), &json!("pocket")));
        assert_eq!(sample["spec"]["image"], cadre_k8s_api::IMAGE);
    }
}
