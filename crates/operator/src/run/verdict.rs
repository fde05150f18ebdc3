//! What an error of the API server means for a reconcile.

use kube::Error;

/// What to do about an error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Planned from an observation that is no longer true: plan again.
    Conflict,
    /// The object is not there.
    Missing,
    /// The namespace is gone or on its way out: nothing can be made in it.
    NamespaceGone,
    /// The API server will not have it as it is; its words.
    Refused(String),
    /// The API server is away, overloaded or in trouble; what comes next would fail as well.
    Failed(String),
}

/// A refusal is about this one object, a failure is about the server. An internal error (500) counts as a refusal: it is
/// what a failing admission webhook looks like, and its words belong into the status.
pub(crate) fn judge(error: &Error) -> Verdict {
    let Error::Api(status) = error else { return Verdict::Failed(error.to_string()) };
    let details = status.details.as_ref();
    let causes = || details.into_iter().flat_map(|details| &details.causes);
    let terminating = causes().any(|cause| cause.reason == "NamespaceTerminating");
    // A patch that names the uid of a pod's predecessor.
    let other_object = causes().any(|cause| cause.field == "metadata.uid");
    match status.code {
        409 => Verdict::Conflict,
        422 if other_object => Verdict::Conflict,
        404 if details.is_some_and(|details| details.kind == "namespaces") => Verdict::NamespaceGone,
        404 => Verdict::Missing,
        403 if terminating => Verdict::NamespaceGone,
        400 | 403 | 405 | 413 | 415 | 422 | 500 => Verdict::Refused(status.message.clone()),
        _ => Verdict::Failed(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use kube::core::Status;
    use serde_json::json;

    use super::*;

    fn verdict(status: serde_json::Value) -> Verdict {
        judge(&Error::Api(serde_json::from_value::<Status>(status).unwrap().boxed()))
    }

    #[test]
    fn refusals_are_told_from_failures_and_from_stale_observations() {
        let refused = |code| verdict(json!({"code": code, "message": "no", "reason": "x"}));
        for code in [400, 403, 405, 413, 415, 422, 500] {
            assert_eq!(refused(code), Verdict::Refused("no".into()), "{code}");
        }
        for code in [401, 408, 410, 429, 502, 503, 504] {
            assert!(matches!(refused(code), Verdict::Failed(_)), "{code}");
        }
        assert_eq!(refused(409), Verdict::Conflict);
        assert_eq!(refused(404), Verdict::Missing);
        let away = std::io::Error::other("connection refused");
        assert!(matches!(judge(&Error::Service(away.into())), Verdict::Failed(_)));
    }

    #[test]
    fn an_object_made_again_under_the_name_is_a_stale_observation() {
        // As Kubernetes 1.35 answers to a pod's status patch with another uid.
        let other = json!({"code": 422, "reason": "Invalid",
            "message": "Pod \"p\" is invalid: metadata.uid: Invalid value: \"u\": field is immutable",
            "details": {"name": "p", "kind": "Pod", "causes": [{"reason": "FieldValueInvalid",
                "message": "Invalid value: \"u\": field is immutable", "field": "metadata.uid"}]}});
        assert_eq!(verdict(other), Verdict::Conflict);
    }

    #[test]
    fn a_namespace_that_goes_is_no_refusal() {
        let gone = json!({"code": 404, "message": "namespaces \"x\" not found", "reason": "NotFound",
            "details": {"name": "x", "kind": "namespaces"}});
        assert_eq!(verdict(gone), Verdict::NamespaceGone);
        let going = json!({"code": 403, "message": "forbidden: being terminated", "reason": "Forbidden",
            "details": {"causes": [{"reason": "NamespaceTerminating", "message": "x", "field": "metadata.namespace"}]}});
        assert_eq!(verdict(going), Verdict::NamespaceGone);
    }
}
