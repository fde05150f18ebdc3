//! A schema in words: type and bounds of one field.

use serde_json::Value;

/// The type: `integer`, `list of objects`, `map of quantities`, or the values that there are.
pub(super) fn type_of(schema: &Value) -> String {
    if let Some(values) = schema["enum"].as_array() {
        let values = values.iter().filter_map(Value::as_str).map(|value| format!("`{value}`"));
        return values.collect::<Vec<_>>().join(", ");
    }
    if schema["x-kubernetes-int-or-string"] == true {
        return "quantity".to_owned();
    }
    match schema["type"].as_str().unwrap_or_default() {
        "array" => format!("list of {}", several(&type_of(&schema["items"]))),
        "object" if schema["additionalProperties"].is_object() => {
            format!("map of {}", several(&type_of(&schema["additionalProperties"])))
        }
        "string" if schema["format"] == "date-time" => "time".to_owned(),
        other => other.to_owned(),
    }
}

fn several(word: &str) -> String {
    match word.strip_suffix('y') {
        Some(stem) => format!("{stem}ies"),
        None => format!("{word}s"),
    }
}

/// Bounds: of numbers, of lengths, of the entries of a list or map and of what is in it; `pattern` names patterns.
pub(super) fn bounds_of(schema: &Value, pattern: &mut impl FnMut(&str) -> String) -> String {
    let mut parts = Vec::new();
    parts.extend(range(schema, ["minimum", "maximum"], ""));
    // A quantity is a string too, but its length says nothing.
    if schema["type"] == "string" {
        parts.extend(range(schema, ["minLength", "maxLength"], " characters"));
    }
    parts.extend(range(schema, ["minItems", "maxItems"], " entries"));
    parts.extend(range(schema, ["minProperties", "maxProperties"], " entries"));
    if let Some(text) = schema["pattern"].as_str().filter(|_| schema["type"] == "string") {
        parts.push(pattern(text));
    }
    if let Some(inner) = schema.get("additionalProperties").filter(|inner| inner.is_object()) {
        let inner = bounds_of(inner, pattern);
        parts.extend((!inner.is_empty()).then(|| format!("each {inner}")));
    }
    parts.join(", ")
}

fn range(schema: &Value, [least, most]: [&str; 2], unit: &str) -> Option<String> {
    let number = |key: &str| schema[key].as_f64().map(|number| number.to_string());
    match (number(least), number(most)) {
        (Some(least), Some(most)) if least == most => Some(format!("{least}{unit}")),
        (Some(least), Some(most)) => Some(format!("{least} to {most}{unit}")),
        (Some(least), None) => Some(format!("at least {least}{unit}")),
        (None, Some(most)) => Some(format!("at most {most}{unit}")),
        (None, None) => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn types_and_bounds_in_words() {
        let told = |schema: Value| (type_of(&schema), bounds_of(&schema, &mut |_| "pattern 1".to_owned()));
        let words = |type_: &str, bounds: &str| (type_.to_owned(), bounds.to_owned());
        assert_eq!(
            told(json!({"type": "integer", "minimum": 0, "maximum": 1000000})),
            words("integer", "0 to 1000000")
        );
        assert_eq!(told(json!({"type": "string", "enum": ["A", "B"]})), words("`A`, `B`", ""));
        assert_eq!(
            told(json!({"type": "string", "maxLength": 9, "pattern": "^a$"})),
            words("string", "at most 9 characters, pattern 1")
        );
        let quantity = json!({"x-kubernetes-int-or-string": true, "pattern": "x", "maxLength": 32});
        assert_eq!(told(quantity.clone()), words("quantity", ""));
        assert_eq!(
            told(json!({"type": "object", "maxProperties": 8, "additionalProperties": quantity})),
            words("map of quantities", "at most 8 entries")
        );
        assert_eq!(
            told(json!({"type": "array", "maxItems": 4, "items": {"type": "object"}})),
            words("list of objects", "at most 4 entries")
        );
        assert_eq!(told(json!({"type": "string", "format": "date-time"})), words("time", ""));
    }
}
