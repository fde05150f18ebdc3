//! Messages of rules as people read them: `'copies: ' + string(self.experts.minCopies)` becomes
//! `copies: ⟨experts.minCopies⟩`.

use serde_json::Value;

/// What a rule says when it is broken.
pub(super) fn of_rule(rule: &Value) -> String {
    match rule["messageExpression"].as_str() {
        Some(expression) => of_expression(expression),
        None => rule["message"].as_str().unwrap_or_default().to_owned(),
    }
}

/// A concatenation of literals and expressions; anything else comes back as one expression.
fn of_expression(expression: &str) -> String {
    terms(expression).into_iter().map(term).collect()
}

fn term(term: &str) -> String {
    let literal = term.strip_prefix('\'').and_then(|rest| rest.strip_suffix('\''));
    if let Some(literal) = literal.filter(|literal| !literal.contains('\'')) {
        return literal.to_owned();
    }
    let inner = term.strip_prefix("string(").and_then(|rest| rest.strip_suffix(')')).unwrap_or(term);
    format!("⟨{}⟩", inner.replace("self.", ""))
}

/// The operands of `+` outside quotes and parentheses.
fn terms(expression: &str) -> Vec<&str> {
    let (mut quoted, mut depth, mut begin) = (false, 0_u32, 0);
    let mut terms = Vec::new();
    for (at, character) in expression.char_indices() {
        match character {
            '\'' => quoted = !quoted,
            '(' | '[' if !quoted => depth += 1,
            ')' | ']' if !quoted => depth = depth.saturating_sub(1),
            '+' if !quoted && depth == 0 => {
                terms.push(expression[begin..at].trim());
                begin = at + 1;
            }
            _ => {}
        }
    }
    terms.push(expression[begin..].trim());
    terms
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn literals_stay_and_expressions_are_marked() {
        let told = |expression: &str| of_rule(&json!({"messageExpression": expression}));
        assert_eq!(
            told("'need ' + string(self.a.b * (self.a.c - 1)) + ', not ' + string(self.d)"),
            "need ⟨a.b * (a.c - 1)⟩, not ⟨d⟩"
        );
        assert_eq!(told("'a + b (c' + self.name"), "a + b (c⟨name⟩");
        assert_eq!(told("self.name"), "⟨name⟩");
        assert_eq!(of_rule(&json!({"message": "plain"})), "plain");
    }
}
