use super::*;

fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn failed(code: &str, message: &str) -> Outcome {
    Outcome::Failed { code: code.into(), message: message.into() }
}

#[test]
fn failures_are_counted_by_code_with_the_first_message_and_both_times() {
    let mut tally = Tally::default();
    for (at, outcome) in [
        (1000, Outcome::Ok),
        (2000, failed("Unavailable", "decode-0 is gone")),
        (2500, failed("Cancelled", "reset")),
        (3000, failed("Unavailable", "later")),
    ] {
        tally.began(ms(at - 500));
        tally.finished(ms(at), outcome);
    }
    let summary = tally.summary(ms(4000));
    assert_eq!((summary.ok, summary.failed, summary.different), (1, 3, 0));
    let wanted = Failures { count: 2, first_at: 2.0, last_at: 3.0, message: "decode-0 is gone".into() };
    assert_eq!(summary.failures["Unavailable"], wanted);
    assert_eq!(summary.failures["Cancelled"].count, 1);
}

#[test]
fn gaps_belong_to_streams_and_silence_to_all_of_them() {
    let mut tally = Tally::default();
    tally.began(ms(0));
    tally.began(ms(0));
    tally.first_token(ms(100), ms(100));
    tally.first_token(ms(200), ms(200));
    // One stream waits 600 ms while the other goes on: a gap, no silence.
    tally.next_token(ms(400), ms(300));
    tally.next_token(ms(700), ms(300));
    tally.next_token(ms(800), ms(600));
    let summary = tally.summary(ms(800));
    assert_eq!(summary.longest_gap, Longest { ms: 600.0, at: 0.8 });
    assert_eq!(summary.longest_silence, Longest { ms: 300.0, at: 0.7 });
}

#[test]
fn silence_at_the_end_counts_while_a_request_waits() {
    let mut tally = Tally::default();
    tally.began(ms(0));
    assert_eq!(tally.summary(ms(5000)).longest_silence.ms, 5000.0);
    tally.finished(ms(5000), failed("Unavailable", "gone"));
    assert_eq!(tally.summary(ms(90_000)).longest_silence.ms, 5000.0);
}

#[test]
fn progress_has_the_gap_since_the_last_one() {
    let mut tally = Tally::default();
    tally.began(ms(0));
    tally.next_token(ms(900), ms(900));
    let first = tally.progress(ms(1000));
    assert_eq!((first.longest_gap_ms, first.running), (900.0, 1));
    tally.next_token(ms(1100), ms(50));
    assert_eq!(tally.progress(ms(2000)).longest_gap_ms, 50.0);
    assert_eq!(tally.summary(ms(2000)).longest_gap.ms, 900.0);
}

#[test]
fn quantiles_are_within_a_class_of_the_truth() {
    let mut tally = Tally::default();
    for wait in 1..=1000 {
        tally.first_token(ms(wait), ms(wait));
    }
    let ttft = tally.summary(ms(1000)).ttft_ms.expect("tokens came");
    assert!((500.0..=500.0 * RATIO).contains(&ttft.p50), "{ttft:?}");
    assert!((990.0..=1000.0).contains(&ttft.p99), "{ttft:?}");
    assert_eq!(ttft.most, 1000.0);
    assert_eq!(Tally::default().summary(ms(1)).ttft_ms, None);
}

#[test]
fn an_hour_fits_the_last_class() {
    let mut tally = Tally::default();
    tally.first_token(ms(1), Duration::from_secs(36_000));
    let ttft = tally.summary(ms(1)).ttft_ms.expect("a token came");
    assert!(ttft.p50 > 1_000_000.0, "{ttft:?}");
}

#[test]
fn texts_that_differ_are_kept_up_to_a_bound() {
    let mut tally = Tally::default();
    for _ in 0..10 {
        tally.began(ms(0));
        let outcome = Outcome::Different { prompt: "p".into(), expected: "e".into(), text: "t".into() };
        tally.finished(ms(1), outcome);
    }
    let summary = tally.summary(ms(1));
    assert_eq!((summary.different, summary.samples.len()), (10, SAMPLES));
}
