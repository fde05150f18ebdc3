use super::*;

fn seen(uid: &str, resource_version: &str, deleting: bool) -> Version {
    Version { uid: uid.into(), resource_version: resource_version.into(), deleting }
}

#[test]
fn versions_are_compared_as_numbers() {
    let written = Shows::Version("100".into());
    assert!(!written.is_shown_by(None));
    assert!(!written.is_shown_by(Some(&seen("u", "99", false))));
    assert!(written.is_shown_by(Some(&seen("u", "100", false))));
    assert!(written.is_shown_by(Some(&seen("u", "1000", false))));
    let opaque = Shows::Version("abc".into());
    assert!(
        !opaque.is_shown_by(Some(&seen("u", "xyz", false)))
            && opaque.is_shown_by(Some(&seen("u", "abc", false)))
    );
}

#[test]
fn a_deletion_shows_as_absence_as_deletion_time_or_as_a_successor() {
    let leaving = Shows::Leaving("u".into());
    assert!(!leaving.is_shown_by(Some(&seen("u", "9", false))));
    assert!(leaving.is_shown_by(Some(&seen("u", "9", true))));
    assert!(leaving.is_shown_by(Some(&seen("v", "9", false))));
    assert!(leaving.is_shown_by(None));
}
