//! The part of validation that is no rule: types, bounds, patterns, required and unknown fields, after the
//! structural schema of a CustomResourceDefinition. Only the keywords that our schemas use; a test walks the
//! schemas for others, so that a new keyword cannot be overlooked.

use regex::Regex;
use serde_json::{Map, Value};

use super::Refusal;

/// The keywords that [`check`] knows, or that say nothing about validity.
#[cfg(test)]
pub(super) const KEYWORDS: [&str; 22] = [
    "type",
    "properties",
    "required",
    "additionalProperties",
    "items",
    "enum",
    "pattern",
    "minLength",
    "maxLength",
    "minimum",
    "maximum",
    "maxItems",
    "maxProperties",
    "format",
    "x-kubernetes-int-or-string",
    "x-kubernetes-list-type",
    "x-kubernetes-list-map-keys",
    "x-kubernetes-validations",
    "default",
    "description",
    "title",
    "minItems",
];

/// Fields of `metadata` that users and servers write.
const METADATA: [&str; 15] = [
    "name",
    "generateName",
    "namespace",
    "labels",
    "annotations",
    "finalizers",
    "ownerReferences",
    "uid",
    "resourceVersion",
    "generation",
    "creationTimestamp",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "managedFields",
    "selfLink",
];

/// Every way in which `object` is not what the schema says.
pub(super) fn check(object: &Value, schema: &Value) -> Vec<Refusal> {
    let mut faults = Vec::new();
    let (Some(fields), Some(properties)) = (object.as_object(), schema["properties"].as_object()) else {
        return vec![Refusal { path: String::new(), message: "is no object".into() }];
    };
    for (key, value) in fields {
        match key.as_str() {
            "apiVersion" | "kind" => {}
            "metadata" => unknown(value, METADATA.as_slice(), "metadata", &mut faults),
            _ => match properties.get(key) {
                Some(inner) => visit(value, inner, key, &mut faults),
                None => fault(&mut faults, key, "unknown field; there are metadata, spec and status".into()),
            },
        }
    }
    if !fields.contains_key("spec") {
        fault(&mut faults, "spec", "is required".into());
    }
    faults
}

fn fault(faults: &mut Vec<Refusal>, path: &str, message: String) {
    faults.push(Refusal { path: path.to_owned(), message });
}

fn unknown(value: &Value, known: &[&str], path: &str, faults: &mut Vec<Refusal>) {
    let keys = value.as_object().into_iter().flat_map(Map::keys);
    for key in keys.filter(|key| !known.contains(&key.as_str())) {
        fault(faults, &format!("{path}.{key}"), format!("unknown field; there are {}", known.join(", ")));
    }
}

fn visit(value: &Value, schema: &Value, path: &str, faults: &mut Vec<Refusal>) {
    if schema["x-kubernetes-int-or-string"] == true {
        match value {
            Value::String(text) => string(text, schema, path, faults),
            Value::Number(number) if number.is_i64() || number.is_u64() => {
                string(&number.to_string(), schema, path, faults);
            }
            _ => fault(faults, path, "must be a quantity: an integer or a string (512Mi, 500m)".into()),
        }
        return;
    }
    match (schema["type"].as_str().unwrap_or_default(), value) {
        ("object", Value::Object(map)) => object(map, schema, path, faults),
        ("array", Value::Array(items)) => list(items, schema, path, faults),
        ("string", Value::String(text)) => string(text, schema, path, faults),
        ("integer", Value::Number(number)) => match number.as_i64() {
            Some(integer) => range(integer, schema, path, faults),
            None => fault(faults, path, format!("must be an integer, not {number}")),
        },
        ("boolean", Value::Bool(_)) => {}
        (wanted, _) => fault(faults, path, format!("must be of type {wanted}, not {value}")),
    }
}

fn object(map: &Map<String, Value>, schema: &Value, path: &str, faults: &mut Vec<Refusal>) {
    bound(map.len(), schema, ["", "maxProperties"], "entries", path, faults);
    if let Some(inner) = schema.get("additionalProperties").filter(|inner| inner.is_object()) {
        for (key, value) in map {
            visit(value, inner, &format!("{path}[{key}]"), faults);
        }
        return;
    }
    let none = Map::new();
    let properties = schema["properties"].as_object().unwrap_or(&none);
    for required in schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        if !map.contains_key(required) {
            fault(faults, &format!("{path}.{required}"), "is required".into());
        }
    }
    let known: Vec<&str> = properties.keys().map(String::as_str).collect();
    for (key, value) in map {
        match properties.get(key) {
            Some(inner) => visit(value, inner, &format!("{path}.{key}"), faults),
            None => {
                fault(
                    faults,
                    &format!("{path}.{key}"),
                    format!("unknown field; there are {}", known.join(", ")),
                );
            }
        }
    }
}

fn list(items: &[Value], schema: &Value, path: &str, faults: &mut Vec<Refusal>) {
    bound(items.len(), schema, ["minItems", "maxItems"], "items", path, faults);
    for (index, item) in items.iter().enumerate() {
        visit(item, &schema["items"], &format!("{path}[{index}]"), faults);
    }
    if schema["x-kubernetes-list-type"] == "map" {
        let keys = schema["x-kubernetes-list-map-keys"].as_array().cloned().unwrap_or_default();
        let key = |item: &Value| {
            keys.iter().map(|key| item[key.as_str().unwrap_or_default()].clone()).collect::<Vec<_>>()
        };
        for (index, item) in items.iter().enumerate() {
            if items[..index].iter().any(|earlier| key(earlier) == key(item)) {
                fault(faults, &format!("{path}[{index}]"), "is there twice".into());
            }
        }
    }
}

fn string(text: &str, schema: &Value, path: &str, faults: &mut Vec<Refusal>) {
    bound(text.chars().count(), schema, ["minLength", "maxLength"], "characters", path, faults);
    if let Some(allowed) = schema["enum"].as_array()
        && !allowed.iter().any(|value| value == text)
    {
        let allowed: Vec<&str> = allowed.iter().filter_map(Value::as_str).collect();
        fault(faults, path, format!("{text:?} is none of {}", allowed.join(", ")));
    }
    if let Some(pattern) = schema["pattern"].as_str() {
        match Regex::new(pattern) {
            Ok(regex) if regex.is_match(text) => {}
            Ok(_) => fault(faults, path, format!("{text:?} does not match '{pattern}'")),
            Err(error) => fault(faults, path, format!("the schema's pattern is broken: {error}")),
        }
    }
}

fn range(integer: i64, schema: &Value, path: &str, faults: &mut Vec<Refusal>) {
    // Bounds may be written as 1 or 1.0.
    let limit = |key: &str| schema[key].as_f64();
    #[allow(
        clippy::cast_precision_loss,
        reason = "bounds are below 2^53, and beyond it any value is out of them"
    )]
    let number = integer as f64;
    let is_int32 = schema["format"] == "int32";
    let (low, high) = (limit("minimum"), limit("maximum"));
    if is_int32 && i32::try_from(integer).is_err() {
        fault(faults, path, format!("{integer} does not fit 32 bits"));
    } else if low.is_some_and(|low| number < low) {
        fault(faults, path, format!("{integer} is less than {}", low.unwrap_or_default()));
    } else if high.is_some_and(|high| number > high) {
        fault(faults, path, format!("{integer} is more than {}", high.unwrap_or_default()));
    }
}

fn bound(
    count: usize,
    schema: &Value,
    [min, max]: [&str; 2],
    what: &str,
    path: &str,
    faults: &mut Vec<Refusal>,
) {
    let limit = |key: &str| schema.get(key).and_then(Value::as_u64);
    let count = count as u64;
    if let Some(low) = limit(min).filter(|low| count < *low) {
        fault(faults, path, format!("has {count} {what}, at least {low} are needed"));
    }
    if let Some(high) = limit(max).filter(|high| count > *high) {
        fault(faults, path, format!("has {count} {what}, at most {high} are allowed"));
    }
}
