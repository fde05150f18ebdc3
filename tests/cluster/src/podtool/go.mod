module cadre.test/cluster/podtool

go 1.25
