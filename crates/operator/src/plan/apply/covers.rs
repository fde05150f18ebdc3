//! Whether an object has everything that is wanted of it.
//!
//! Follows what server-side apply would change. Maps: the wanted keys. Lists of named things (containers, ports,
//! variables, owners): the wanted ones, whoever else adds some. Other lists are replaced whole, so they must be
//! equal. Quantities by their value, because the API server writes them its own way (`1024Mi` → `1Gi`).

use cadre_k8s_api::quantity;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use serde_json::{Map, Value};

/// Keys of Kubernetes' keyed lists that we render, the more telling first: a ServiceAccount's owner has a name
/// as well as a uid, a mount a name as well as a path.
const KEYS: [&str; 5] = ["uid", "mountPath", "containerPort", "topologyKey", "name"];

/// Path of the first wanted field that is otherwise.
pub(super) fn difference(wanted: &Value, live: &Value) -> Option<String> {
    differs(wanted, live).map(|mut path| {
        path.reverse();
        path.join(".")
    })
}

/// The path in reverse.
fn differs(wanted: &Value, live: &Value) -> Option<Vec<String>> {
    match (wanted, live) {
        (Value::Object(wanted), Value::Object(live)) => map(wanted, live),
        (Value::Array(wanted), Value::Array(live)) => list(wanted, live),
        (wanted, live) => (wanted != live).then(Vec::new),
    }
}

fn map(wanted: &Map<String, Value>, live: &Map<String, Value>) -> Option<Vec<String>> {
    wanted.iter().find_map(|(key, value)| {
        let inner = match (key.as_str(), value, live.get(key)) {
            (_, _, None) => Some(Vec::new()),
            ("requests" | "limits", Value::Object(value), Some(Value::Object(live))) => {
                quantities(value, live)
            }
            // Terms of pod affinity have a topologyKey each, which names none of them.
            ("affinity", value, Some(live)) => (!is_same(value, live)).then(Vec::new),
            (_, value, Some(live)) => differs(value, live),
        };
        inner.map(|mut path| {
            path.push(key.clone());
            path
        })
    })
}

/// The wanted keys of maps, and lists item by item.
fn is_same(wanted: &Value, live: &Value) -> bool {
    match (wanted, live) {
        (Value::Object(wanted), Value::Object(live)) => {
            wanted.iter().all(|(key, value)| live.get(key).is_some_and(|live| is_same(value, live)))
        }
        (Value::Array(wanted), Value::Array(live)) => {
            wanted.len() == live.len() && wanted.iter().zip(live).all(|(wanted, live)| is_same(wanted, live))
        }
        (wanted, live) => wanted == live,
    }
}

fn list(wanted: &[Value], live: &[Value]) -> Option<Vec<String>> {
    if let Some(key) =
        KEYS.into_iter().find(|key| !wanted.is_empty() && wanted.iter().all(|item| item.get(key).is_some()))
    {
        return wanted.iter().find_map(|item| {
            match live.iter().find(|live| live.get(key) == item.get(key)) {
                Some(live) => differs(item, live),
                None => Some(Vec::new()),
            }
        });
    }
    match wanted.len() == live.len() {
        true => wanted.iter().zip(live).find_map(|(wanted, live)| differs(wanted, live)),
        false => Some(Vec::new()),
    }
}

/// Resources: every quantity is ours, so none may be missing and none too many.
fn quantities(wanted: &Map<String, Value>, live: &Map<String, Value>) -> Option<Vec<String>> {
    let same = |name: &String, value: &Value| live.get(name).is_some_and(|live| same_quantity(value, live));
    wanted.iter().find(|(name, value)| !same(name, value)).map(|(name, _)| vec![name.clone()])
}

fn same_quantity(a: &Value, b: &Value) -> bool {
    let (Some(a_text), Some(b_text)) = (a.as_str(), b.as_str()) else { return a == b };
    let read = |text: &str, of: fn(&Quantity) -> Result<u64, quantity::QuantityError>| {
        of(&Quantity(text.to_owned())).ok()
    };
    let same = |of| read(a_text, of).is_some_and(|a| Some(a) == read(b_text, of));
    // Thousandths of the largest numbers do not fit; whole units of the smallest are all alike.
    a_text == b_text
        || same(quantity::thousandths)
        || (read(a_text, quantity::thousandths).is_none() && same(quantity::units))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn path(wanted: Value, live: Value) -> Option<String> {
        difference(&wanted, &live)
    }

    #[test]
    fn what_others_add_does_not_count() {
        let wanted =
            json!({"spec": {"ports": [{"name": "http", "port": 8000}]}, "metadata": {"labels": {"a": "b"}}});
        let live = json!({
            "spec": {"ports": [{"name": "x", "port": 1}, {"name": "http", "port": 8000, "nodePort": 3}], "type": "ClusterIP"},
            "metadata": {"labels": {"a": "b", "c": "d"}, "uid": "u"},
        });
        assert_eq!(path(wanted, live), None);
    }

    #[test]
    fn what_is_otherwise_is_named() {
        let container = |image: &str, args: &[&str]| json!({"spec": {"containers": [{"name": "cadre", "image": image, "args": args}]}});
        let wanted = || container("a:1", &["router", "--x"]);
        assert_eq!(path(wanted(), container("a:1", &["router", "--x"])), None);
        assert_eq!(
            path(wanted(), container("a:2", &["router", "--x"])),
            Some("spec.containers.image".into())
        );
        assert_eq!(path(wanted(), container("a:1", &["router", "--y"])), Some("spec.containers.args".into()));
        assert_eq!(path(wanted(), container("a:1", &["router"])), Some("spec.containers.args".into()));
        assert_eq!(path(wanted(), json!({"spec": {}})), Some("spec.containers".into()));
        assert_eq!(path(json!({"replicas": 0}), json!({})), Some("replicas".into()));
    }

    #[test]
    fn quantities_are_the_same_by_value() {
        let resources = |memory: &str, cpu: &str| json!({"requests": {"memory": memory, "cpu": cpu}});
        assert_eq!(path(resources("1024Mi", "0.5"), resources("1Gi", "500m")), None);
        assert_eq!(path(resources("15Ei", "1"), resources("15Ei", "1000m")), None);
        assert_eq!(path(resources("1Gi", "1"), resources("1G", "1")), Some("requests.memory".into()));
        assert_eq!(path(resources("1Gi", "100m"), resources("1Gi", "200m")), Some("requests.cpu".into()));
        assert_eq!(path(json!({"limits": {"cpu": "1"}}), json!({"limits": {}})), Some("limits.cpu".into()));
    }
}
